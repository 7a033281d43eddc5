"""The understanding model as a designer: it writes the blueprint that it will be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dim.blueprint import request_prompt
from dim.errors import InputError
from dim.model.conditioner import Conditioner, ImageFeatures, OnText
from dim.model.config import INSTRUCTION, UnderstandingConfig


@dataclass(frozen=True)
class Understanding:
    """A vision-language model, and how it is asked for a design."""

    conditioner: Conditioner
    config: UnderstandingConfig

    def design(
        self,
        images: Sequence[Image.Image] | ImageFeatures,
        instructions: Sequence[str],
        on_text: OnText | None = None,
    ) -> list[str]:
        """The model's own answers to "write the blueprint of this edit", unchecked.

        ``on_text`` hears of them while they are written; see ``Conditioner.generate``.

        Raises:
            InputError: an instruction is empty, counts differ, or an image cannot be read.
        """
        requests = [self._request(instruction) for instruction in instructions]
        most = self.config.design_max_new_tokens
        return self.conditioner.generate(requests, images, most, on_text)

    def _request(self, instruction: str) -> str:
        if not instruction.strip():
            raise InputError("the instruction is empty")
        template = self.config.design_request
        if template is None:
            return request_prompt(instruction, with_target=False)
        return template.replace(INSTRUCTION, instruction)
