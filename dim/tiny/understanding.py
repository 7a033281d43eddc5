"""The tiny Qwen2.5-VL, trained to read tabletop images and to write blueprints of edits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

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
from dim.model.tokenizer import build_tokenizer
from dim.tiny.config import TinyBuildConfig
from dim.tiny.corpus import Conversation, conversation, edit, tokenizer_texts
from dim.tiny.schedule import Progress, Trainer, seeded

_IGNORED = -100


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
    part = config.understanding
    seeded(config.seed)
    conditioner = new_understanding(config, model)
    network = conditioner.model.requires_grad_(True).train()
    batches = _Batches(conditioner, config)
    trainer = Trainer("understanding", [network], part, out / "understanding.jsonl", progress)
    for step in range(part.steps):
        first, done = step * part.batch_size, step / part.steps
        texts = [conversation(config, part, first + i, done) for i in range(part.batch_size)]
        trainer.update(_loss(network, *batches.make(texts)))
    network.requires_grad_(False).eval()
    return conditioner


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


def _loss(
    network: Qwen2_5_VLForConditionalGeneration, inputs: dict[str, Tensor], labels: Tensor
) -> Tensor:
    logits = network(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
    )


class _Batches:
    """Conversations as padded tensors, with every word of the user and assistant as a label."""

    def __init__(self, conditioner: Conditioner, config: TinyBuildConfig) -> None:
        self.conditioner, self.config = conditioner, config
        self.tokenizer: PreTrainedTokenizerBase = conditioner.tokenizer
        vision = conditioner.model.config.vision_config
        side = conditioner.image_size // vision.patch_size // vision.spatial_merge_size
        self.image_tokens = side * side

    def make(self, texts: list[Conversation]) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs (B, L) and labels (B, L)."""
        rows = [self._tokens(text) for text in texts]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), int(self.tokenizer.pad_token_id))
        labels = torch.full((len(rows), length), _IGNORED)
        mask = torch.zeros_like(ids)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
            mask[row, : len(tokens)] = 1
        kinds = torch.where(ids == self.conditioner.chat.image_token, IMAGE_TYPE, TEXT_TYPE)
        labels[kinds == IMAGE_TYPE] = _IGNORED
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        return inputs | self._pixels(texts), labels

    def _tokens(self, text: Conversation) -> tuple[list[int], int]:
        """Tokens of a whole conversation, and where the user's content starts."""
        chat, images = self.conditioner.chat, self.image_tokens if text.scene else 0
        if text.assistant is None:
            prompt = chat.prompt(text.user, images)
            ids = prompt.ids
        else:
            prompt = chat.request(text.user, images)
            ids = prompt.ids + self.tokenizer(text.assistant, add_special_tokens=False).input_ids
        return [*ids, int(self.tokenizer.eos_token_id)], prompt.start

    def _pixels(self, texts: list[Conversation]) -> dict[str, Tensor]:
        size = self.conditioner.image_size
        images = [tabletop.render(text.scene, size) for text in texts if text.scene]
        if not images:
            return {}
        patches = self.conditioner.image_processor(images=images, return_tensors="pt")
        return {name: patches[name] for name in ("pixel_values", "image_grid_thw")}
