"""The tiny Qwen2.5-VL, trained to read tabletop images and to write blueprints of edits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim import tabletop
from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from dim.model import parts
from dim.model.conditioner import IMAGE_TYPE, TEXT_TYPE, Conditioner
from dim.model.config import UnderstandingConfig
from dim.model.prompt import Prompt
from dim.model.tokenizer import build_tokenizer
from dim.tabletop import Scene
from dim.tiny.auxiliary import AuxiliaryHeads, Mention, auxiliary_heads, cell_labels, mentions
from dim.tiny.config import TinyBuildConfig, UnderstandingPartConfig
from dim.tiny.corpus import Conversation, conversation, edit, tokenizer_texts
from dim.tiny.schedule import Progress, Trainer, seeded

_IGNORED = -100
_POOL = 4


def new_understanding(config: TinyBuildConfig, model: UnderstandingConfig) -> Conditioner:
    """The tokenizer learnt from the corpus, and a random network around it."""
    size = int(model.architecture["text_config"]["vocab_size"])
    tokenizer = build_tokenizer(tokenizer_texts(config), size)
    network = Qwen2_5_VLForConditionalGeneration(
        parts.understanding_config(model.architecture, tokenizer)
    )
    return Conditioner(
        network,
        tokenizer,
        parts.image_processor(network.config),
        image_size=model.image_size,
        max_condition_tokens=model.max_condition_tokens,
    )


def train_understanding(
    config: TinyBuildConfig, model: UnderstandingConfig, out: Path, progress: Progress
) -> Conditioner:
    """Train from nothing by next-token prediction; the log goes to ``out/understanding.jsonl``."""
    seeded(config.seed)
    conditioner = new_understanding(config, model)
    _train(conditioner, config, config.understanding, "understanding", out, progress)
    return conditioner


def train_binding(
    config: TinyBuildConfig, conditioner: Conditioner, out: Path, progress: Progress
) -> None:
    """Go on with ``conditioner`` in place, binding words; the log goes to ``out/binding.jsonl``."""
    seeded(config.seed)
    _train(conditioner, config, config.binding, "binding", out, progress)


def _train(
    conditioner: Conditioner,
    config: TinyBuildConfig,
    part: UnderstandingPartConfig,
    stream: str,
    out: Path,
    progress: Progress,
) -> None:
    network = conditioner.model.requires_grad_(True).train()
    batches = _Batches(conditioner, config, part, stream)
    heads = auxiliary_heads(conditioner.hidden_size, batches.side)
    trainer = Trainer(stream, [network, *heads], part, out / f"{stream}.jsonl", progress)
    for step in range(part.steps):
        if step % _POOL == 0:
            pool = batches.pool(step)
        trainer.update(_loss(network, heads, part, batches.make(pool[step % _POOL])))
    network.requires_grad_(False).eval()


def design_accuracy(
    config: TinyBuildConfig, conditioner: Conditioner, limit: int
) -> dict[str, float]:
    """Share of held-out edits whose blueprint the model writes rightly, section by section.

    ``blueprint`` counts the answers that are right from the first word to the last, ``decisive``
    those whose edit area and result are right, which is what a painter follows.
    """
    edits = [edit(config, "evaluation", i) for i in range(config.evaluate)]
    right: Counter[str] = Counter()
    for start in range(0, len(edits), 50):
        some = edits[start : start + 50]
        images = [tabletop.render(sample.source, config.resolution) for sample in some]
        answers = conditioner.generate([sample.instruction for sample in some], images, limit)
        for sample, answer in zip(some, answers, strict=True):
            right.update(_right_sections(answer, sample.blueprint))
    names = ["parsed", *Blueprint.__dataclass_fields__, "decisive", "blueprint"]
    return {name: right[name] / len(edits) for name in names}


def _right_sections(answer: str, truth: Blueprint) -> list[str]:
    try:
        written = Blueprint.parse(answer)
    except BlueprintError:
        return []
    names = [n for n in Blueprint.__dataclass_fields__ if getattr(written, n) == getattr(truth, n)]
    decisive = ["decisive"] * ({"edit_area", "imagination"} <= set(names))
    return ["parsed", *names, *decisive, *["blueprint"] * (written == truth)]


class Batch(NamedTuple):
    """Model inputs (B, L), labels (B, L), what the images show, and mentions of things.

    ``cells`` (image tokens, 5) are as of ``cell_labels``, none without images. ``rows`` and
    ``tokens`` (M,) say where the mentions are, ``words`` (M, 4) what they say.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    cells: Tensor
    rows: Tensor
    tokens: Tensor
    words: Tensor


def _loss(
    network: Qwen2_5_VLForConditionalGeneration,
    heads: AuxiliaryHeads,
    part: UnderstandingPartConfig,
    batch: Batch,
) -> Tensor:
    """Next-token prediction, grounding in a middle layer, and binding in the last."""
    output = network(**batch.inputs, use_cache=False, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=_IGNORED
    )
    if len(batch.cells):
        middle = output.hidden_states[network.config.text_config.num_hidden_layers // 2]
        seen = middle[batch.inputs["mm_token_type_ids"] == IMAGE_TYPE]
        loss = loss + part.grounding_weight * heads.grounding.loss(seen, batch.cells)
    if len(batch.words):
        states = output.hidden_states[-1][batch.rows, batch.tokens]
        loss = loss + part.binding_weight * heads.binding.loss(states, batch.words)
    return loss


class Row(NamedTuple):
    """A conversation as tokens; those from ``start`` on are to be learnt."""

    ids: list[int]
    start: int
    scene: Scene | None
    mentions: list[Mention]


class _Batches:
    """Conversations as padded tensors; the labels are the answer, or all words without one.

    What a user asks cannot be foretold, and learning to foretell it drowns the answers.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        config: TinyBuildConfig,
        part: UnderstandingPartConfig,
        stream: str,
    ) -> None:
        self.conditioner, self.config = conditioner, config
        self.part, self.stream = part, stream
        self.tokenizer: PreTrainedTokenizerBase = conditioner.tokenizer
        vision = conditioner.model.config.vision_config
        self.side = conditioner.image_size // vision.patch_size // vision.spatial_merge_size
        self.image_tokens = self.side**2

    def pool(self, step: int) -> list[list[Row]]:
        """The batches of ``_POOL`` steps from ``step`` on: texts of about one length together."""
        size, done = self.part.batch_size, step / self.part.steps
        drawn = range(step * size, (step + _POOL) * size)
        rows = [
            self._row(conversation(self.config, self.part, i, done, self.stream)) for i in drawn
        ]
        rows.sort(key=lambda row: len(row.ids))
        return [rows[i * size : (i + 1) * size] for i in torch.randperm(_POOL).tolist()]

    def make(self, rows: list[Row]) -> Batch:
        """The rows padded on the right."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), int(self.tokenizer.pad_token_id))
        labels = torch.full((len(rows), length), _IGNORED)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            end = len(row.ids)
            ids[i, :end] = torch.tensor(row.ids)
            labels[i, row.start : end] = ids[i, row.start : end]
            mask[i, :end] = 1
        kinds = torch.where(ids == self.conditioner.chat.image_token, IMAGE_TYPE, TEXT_TYPE)
        labels[kinds == IMAGE_TYPE] = _IGNORED
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        scenes = [row.scene for row in rows if row.scene]
        said = [(i, *mention) for i, row in enumerate(rows) for mention in row.mentions]
        return Batch(
            inputs | self._pixels(scenes),
            labels,
            cell_labels(scenes, self.side),
            torch.tensor([i for i, _, _ in said], dtype=torch.long),
            torch.tensor([token for _, token, _ in said], dtype=torch.long),
            torch.tensor([words for _, _, words in said], dtype=torch.long),
        )

    def _row(self, text: Conversation) -> Row:
        chat, images = self.conditioner.chat, self.image_tokens if text.scene else 0
        end = int(self.tokenizer.eos_token_id)
        if text.assistant is None:
            prompt = chat.prompt(text.user, images)
            return Row([*prompt.ids, end], prompt.start, text.scene, self._said(text, prompt))
        asked = chat.request(text.user, images)
        answer = self.tokenizer(text.assistant, add_special_tokens=False).input_ids
        ids = [*asked.ids, *answer, end]
        return Row(ids, len(asked.ids), text.scene, self._said(text, asked))

    def _said(self, text: Conversation, prompt: Prompt) -> list[Mention]:
        """Mentions in the user's words, from the start of the prompt; none if none is learnt."""
        if not self.part.binding_weight:
            return []
        found = mentions(text.user, self.tokenizer)
        return [Mention(prompt.text + m.token, m.words) for m in found]

    def _pixels(self, scenes: list[Scene]) -> dict[str, Tensor]:
        if not scenes:
            return {}
        images = [tabletop.render(scene, self.conditioner.image_size) for scene in scenes]
        patches = self.conditioner.image_processor(images=images, return_tensors="pt")
        return {name: patches[name] for name in ("pixel_values", "image_grid_thw")}
