"""A whole task as one question: what a model is asked that can be asked anything."""

from __future__ import annotations

from dim import blueprint, caption, review
from dim.design import ReviewRequest
from dim.designers.base import DesignRequest, Question


def for_blueprint(request: DesignRequest) -> Question:
    """Judge the instruction, where there is a target, and write its blueprint."""
    text = blueprint.request_prompt(request.instruction, request.target is not None)
    images = (request.image, request.target)
    return Question(text, tuple(image for image in images if image is not None))


def for_caption(image: bytes) -> Question:
    """Write the long caption of an encoded image."""
    return Question(caption.request_prompt(), (image,))


def for_review(request: ReviewRequest) -> Question:
    """Compare what was painted with its plan, and write the plan anew where it fell short."""
    text = review.request_prompt(request.instruction, request.plan)
    return Question(text, (request.image, request.painted))
