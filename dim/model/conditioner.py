"""The frozen Qwen2.5-VL: its hidden states condition the painter, and it can design itself."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim.errors import CheckpointError, InputError
from dim.model.framing import Box, stretched, upright_rgb
from dim.model.prompt import IMAGE_PAD, ChatFormat, Prompt

TURN_END = "<|im_end|>"
TEXT_TYPE, IMAGE_TYPE = 0, 1


OnText = Callable[[int, str], None]
"""Called with the number of a row and its text so far."""

TOLD_EVERY = 4  # tokens: decoding a text anew for each of them would be noticed


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower made of a batch's images, to be used in several passes.

    ``features``: (image tokens, hidden_size) a row, None for a row without an image.
    ``grids``: (3,) int64 a row, the patch grid (time, height, width), None likewise.
    """

    features: list[Tensor | None]
    grids: list[Tensor | None]

    def tokens(self, row: int) -> int:
        """Image tokens of a row, 0 without an image."""
        features = self.features[row]
        return 0 if features is None else len(features)

    def select(self, rows: Sequence[int]) -> ImageFeatures:
        """The same for some of the rows."""
        return ImageFeatures(
            [self.features[row] for row in rows], [self.grids[row] for row in rows]
        )


@dataclass(frozen=True)
class Patches:
    """A picture as the vision tower takes it, made without a device and so in any thread.

    ``pixels``: (patches, features) float32. ``grid``: (3,) int64, see ``ImageFeatures``. ``key``:
    equal for equal pictures.
    """

    pixels: Tensor
    grid: Tensor
    key: bytes


@dataclass(frozen=True)
class Batch:
    """Prompts ready for the language model: (B, L, hidden), (B, L), (3, B, L)."""

    embeddings: Tensor
    mask: Tensor
    positions: Tensor


class Conditioner(nn.Module):
    """Qwen2.5-VL behind two calls: ``encode`` for conditions, ``generate`` for designs.

    Args:
        model: the language model with its vision tower; frozen here.
        tokenizer: its tokenizer, with Qwen's special tokens and chat template.
        image_processor: cuts pictures into patches; works without torchvision.
        image_size: every picture is first resized to this square (pixels).
        max_condition_tokens: of a longer content the last so many tokens are kept, as published.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        *,
        image_size: int = 1024,
        max_condition_tokens: int = 8192,
    ) -> None:
        super().__init__()
        self.chat = ChatFormat(tokenizer)
        if self.chat.image_token != model.config.image_token_id:
            raise CheckpointError(
                f"the tokenizer's {IMAGE_PAD} is token {self.chat.image_token}, the model's "
                f"image_token_id {model.config.image_token_id}"
            )
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_size = image_size
        self.max_condition_tokens = max_condition_tokens

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state."""
        return self.model.config.text_config.hidden_size

    def patches(self, image: Image.Image, region: Box | None = None) -> Patches:
        """Cut a picture into patches, all of it or a region of its upright form.

        Raises:
            InputError: it cannot be read.
        """
        return self._cut(self._square(image, region), {})

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image | Patches | None]) -> ImageFeatures:
        """Look at a batch's images; equal ones pass the vision tower once.

        Raises:
            InputError: an image cannot be read.
        """
        distinct: dict[bytes, Patches] = {}
        rows: list[Patches | None] = []
        for image in images:
            if image is not None and not isinstance(image, Patches):
                image = self._cut(self._square(image), distinct)
            rows.append(image)
            if image is not None:
                distinct.setdefault(image.key, image)
        if not distinct:
            return ImageFeatures([None] * len(rows), [None] * len(rows))
        device = self.model.device
        parts = [one.pixels.to(device, non_blocking=True) for one in distinct.values()]
        grids = torch.stack([one.grid for one in distinct.values()])
        features = self.model.model.get_image_features(
            torch.cat(parts), grids.to(device), return_dict=True
        ).pooler_output
        of = {key: (f, g) for key, f, g in zip(distinct, features, grids, strict=True)}
        seen = [(None, None) if row is None else of[row.key] for row in rows]
        return ImageFeatures([feature for feature, _ in seen], [grid for _, grid in seen])

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        images: Sequence[Image.Image | None] | ImageFeatures | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last hidden states (after the final norm) of what the user says, and no others.

        A row is the content of one user turn: vision start, image tokens and vision end when it
        has an image, then the text. The default system turn stands before it as context and is
        left out, as are the turn's own marks.

        Args:
            texts: one a row, not empty.
            images: one a row (None where a row has none) or what ``see`` made of them; None for a
                batch of texts.

        Returns:
            Hidden states (B, N, hidden_size) in the model's type, zero where padded, and the mask
            (B, N) bool; rows are padded on the right to the longest. A row does not depend on its
            neighbours. A content longer than ``max_condition_tokens`` keeps its last tokens, with
            a warning.

        Raises:
            InputError: an empty text, counts that differ, or an image that cannot be read.
        """
        seen = self._seen(texts, images)
        prompts = [self.chat.prompt(text, seen.tokens(row)) for row, text in enumerate(texts)]
        batch = self._batch(prompts, seen, pad_left=False)
        states = self.model.model(
            inputs_embeds=batch.embeddings,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        contents = [states[row, self._kept(p)] for row, p in enumerate(prompts)]
        lengths = torch.tensor([len(content) for content in contents], device=states.device)
        padded = nn.utils.rnn.pad_sequence(contents, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=states.device) < lengths[:, None]

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[str],
        images: Sequence[Image.Image | None] | ImageFeatures | None = None,
        max_new_tokens: int = 1024,
        on_text: OnText | None = None,
    ) -> list[str]:
        """The model's own answers, the likeliest token each time.

        Args:
            requests: one a row, not empty.
            images: as for ``encode``.
            max_new_tokens: an answer is cut off after so many tokens.
            on_text: told every few tokens what a row's answer is so far, in whole characters.

        Returns:
            One text a request, without special tokens.

        Raises:
            InputError: as for ``encode``.
        """
        seen = self._seen(requests, images)
        prompts = [self.chat.request(text, seen.tokens(row)) for row, text in enumerate(requests)]
        batch = self._batch(prompts, seen, pad_left=True)
        cache = DynamicCache(config=self.model.config.text_config)
        embeddings, mask, positions = batch.embeddings, batch.mask, batch.positions
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=mask.device)
        stop = torch.tensor(self._stop_tokens(), device=mask.device)
        answers: list[Tensor] = []
        while len(answers) < max_new_tokens and not bool(ended.all()):
            states = self.model.model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            token = self.model.lm_head(states[:, -1]).argmax(dim=-1)
            ended = ended | torch.isin(token, stop)
            token = token.masked_fill(ended, int(stop[0]))
            answers.append(token)
            if on_text is not None and len(answers) % TOLD_EVERY == 0:
                for row, text in enumerate(self._texts(answers)):
                    on_text(row, text.rstrip("\N{REPLACEMENT CHARACTER}"))
            embeddings = self.model.get_input_embeddings()(token[:, None])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = (positions.amax(dim=(0, 2)) + 1).expand(3, -1)[:, :, None]
        return [text.strip() for text in self._texts(answers)] if answers else [""] * len(prompts)

    def _texts(self, tokens: Sequence[Tensor]) -> list[str]:
        """Of each row the text of its tokens, given step by step."""
        rows = torch.stack(list(tokens), dim=1).tolist()
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _seen(
        self, texts: Sequence[str], images: Sequence[Image.Image | None] | ImageFeatures | None
    ) -> ImageFeatures:
        if not len(texts):
            raise InputError("there are no prompts")
        count = len(images.features) if isinstance(images, ImageFeatures) else len(images or texts)
        if count != len(texts):
            raise InputError(f"{len(texts)} prompts came with {count} images")
        if isinstance(images, ImageFeatures):
            return images
        return self.see(images if images is not None else [None] * len(texts))

    def _square(self, image: Image.Image, region: Box | None = None) -> Image.Image:
        return stretched(upright_rgb(image), (self.image_size, self.image_size), region)

    def _cut(self, square: Image.Image, known: Mapping[bytes, Patches]) -> Patches:
        key = hashlib.sha256(square.tobytes()).digest()
        if key in known:
            return known[key]
        made = self.image_processor(images=[square], return_tensors="pt")
        return Patches(made["pixel_values"], made["image_grid_thw"][0], key)

    def _kept(self, prompt: Prompt) -> slice:
        length = prompt.end - prompt.start
        if length <= self.max_condition_tokens:
            return slice(prompt.start, prompt.end)
        warnings.warn(
            f"a prompt of {length} tokens is longer than {self.max_condition_tokens}; the painter "
            "is conditioned on the last ones only",
            stacklevel=3,
        )
        return slice(prompt.end - self.max_condition_tokens, prompt.end)

    def _stop_tokens(self) -> list[int]:
        names = (TURN_END, self.tokenizer.eos_token)
        return sorted({int(self.tokenizer.convert_tokens_to_ids(name)) for name in names if name})

    def _batch(self, prompts: Sequence[Prompt], seen: ImageFeatures, *, pad_left: bool) -> Batch:
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            length = len(prompt.ids)
            where = slice(longest - length, longest) if pad_left else slice(0, length)
            ids[row, where] = torch.tensor(prompt.ids)
            mask[row, where] = 1
        positions = self._positions(ids, mask, seen)
        device = self.model.device
        return Batch(self._embed(ids.to(device), seen), mask.to(device), positions.to(device))

    def _embed(self, ids: Tensor, seen: ImageFeatures) -> Tensor:
        embeddings = self.model.get_input_embeddings()(ids)
        features = [feature for feature in seen.features if feature is not None]
        if not features:
            return embeddings
        where = (ids == self.chat.image_token)[:, :, None]
        return embeddings.masked_scatter(where, torch.cat(features).to(embeddings))

    def _positions(self, ids: Tensor, mask: Tensor, seen: ImageFeatures) -> Tensor:
        """(3, B, L) rotary positions: time, height and width differ inside an image."""
        grids = [grid for grid in seen.grids if grid is not None]
        if not grids:
            return (mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = torch.where(ids == self.chat.image_token, IMAGE_TYPE, TEXT_TYPE)
        return self.model.model.get_rope_index(
            ids, kinds, image_grid_thw=torch.stack(grids), attention_mask=mask
        )[0]
