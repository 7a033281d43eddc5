from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from dim.errors import CheckpointError, InputError
from dim.model.conditioner import Conditioner
from dim.model.tokenizer import build_tokenizer

TEXTS = ["remove it", "make the large circle blue, please", "é", "move the square to the left"]
IMAGE_TOKENS = 16  # 64 px, patches of 8, merged 2 x 2


@pytest.fixture(scope="module")
def conditioner(tiny) -> Conditioner:
    return tiny.conditioner


@pytest.fixture
def talker(conditioner: Conditioner) -> Conditioner:
    """The same made to say something: louder layers, and a last one that knows printable bytes."""
    model = copy.deepcopy(conditioner.model)
    for name, weight in model.model.named_parameters():
        weight.mul_(20 if "embed_tokens" in name else 8 if "proj" in name else 1)
    model.lm_head = torch.nn.Linear(conditioner.hidden_size, 263, bias=False)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(5))
    torch.nn.init.zeros_(model.lm_head.weight[94:])
    rest = (conditioner.tokenizer, conditioner.image_processor)
    return Conditioner(model, *rest, image_size=64, max_condition_tokens=512)


def by_the_library(conditioner: Conditioner, text: str, image: Image.Image | None):
    """Whole chat through transformers' own forward: ids and states of all tokens."""
    tokenizer = conditioner.tokenizer
    content = [{"type": "image"}] if image else []
    content.append({"type": "text", "text": text})
    printed = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    printed = printed.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
    ids = tokenizer(printed, return_tensors="pt").input_ids
    inputs = {}
    if image:
        inputs = dict(conditioner.image_processor(images=[image], return_tensors="pt"))
        inputs["mm_token_type_ids"] = (ids == conditioner.model.config.image_token_id).int()
    with torch.no_grad():
        output = conditioner.model(input_ids=ids, output_hidden_states=True, **inputs)
    return ids[0].tolist(), output.hidden_states[-1][0], ids, inputs


@pytest.mark.parametrize("with_image", [False, True])
def test_states_are_the_librarys_for_the_users_content_alone(conditioner, photos, with_image):
    image = photos[0] if with_image else None
    ids, states, *_ = by_the_library(conditioner, TEXTS[1], image)
    user = conditioner.tokenizer("<|im_start|>user\n").input_ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(user)] == user) + len(user)
    end = ids.index(conditioner.tokenizer.convert_tokens_to_ids("<|im_end|>"), start)

    encoded, mask = conditioner.encode([TEXTS[1]], [image])

    assert mask.dtype == torch.bool and mask.all()
    assert encoded.shape == (1, end - start, conditioner.hidden_size)
    torch.testing.assert_close(encoded[0], states[start:end], atol=1e-5, rtol=0)


def test_a_row_is_the_same_alone_and_in_a_padded_mixed_batch(conditioner, photos):
    images = [photos[0], photos[1], None, photos[0]]
    together, mask = conditioner.encode(TEXTS, images)
    for row, (text, image) in enumerate(zip(TEXTS, images, strict=True)):
        alone, _ = conditioner.encode([text], [image])
        length = alone.shape[1]
        assert mask[row].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=0)
        assert not together[row, length:].any()


def test_the_image_and_its_place_matter(conditioner, photos):
    one, _ = conditioner.encode(["remove it"], [photos[0]])
    other, _ = conditioner.encode(["remove it"], [photos[2]])
    assert (one - other).abs().max() > 1e-3


def test_equal_images_pass_the_vision_tower_once(conditioner, photos, monkeypatch):
    passes = []
    look = conditioner.model.model.get_image_features
    monkeypatch.setattr(
        conditioner.model.model,
        "get_image_features",
        lambda pixels, grids, **k: passes.append(len(grids)) or look(pixels, grids, **k),
    )
    seen = conditioner.see([photos[0], photos[1], photos[0].copy(), None])
    first, _ = conditioner.encode(TEXTS, seen)
    conditioner.generate(TEXTS, seen, 2)
    assert passes == [2]
    assert seen.features[3] is None and torch.equal(seen.features[0], seen.features[2])
    again, _ = conditioner.encode(TEXTS, [photos[0], photos[1], photos[0], None])
    torch.testing.assert_close(first, again)


def test_special_tokens_typed_by_a_user_are_text(conditioner, photos):
    text = "remove <|im_end|> and <|image_pad|>"
    _, mask = conditioner.encode([text], [photos[0]])
    plain = len(conditioner.tokenizer(text, split_special_tokens=True).input_ids)
    assert int(mask.sum()) == IMAGE_TOKENS + 2 + plain


def test_a_long_prompt_keeps_its_last_tokens_and_says_so(conditioner):
    text = "abcdefgh" * 4
    whole, _ = conditioner.encode([text])
    short = Conditioner(
        conditioner.model,
        conditioner.tokenizer,
        conditioner.image_processor,
        image_size=64,
        max_condition_tokens=10,
    )
    with pytest.warns(UserWarning, match="32 tokens is longer than 10"):
        kept, mask = short.encode([text])
    assert mask.shape == (1, 10)
    torch.testing.assert_close(kept[0], whole[0, -10:])


def test_answers_are_the_librarys_greedy_ones_in_any_batch(talker, photos):
    images = [photos[0], photos[0], None, photos[0]]
    answers = talker.generate(TEXTS, images, 12)
    alone = [talker.generate([t], [i], 12)[0] for t, i in zip(TEXTS, images, strict=True)]
    assert answers == alone
    assert len(set(answers)) == 4 and min(map(len, answers)) > 3
    request = talker.chat.request(TEXTS[0], IMAGE_TOKENS)
    inputs = dict(talker.image_processor(images=[photos[0]], return_tensors="pt"))
    ids = torch.tensor([request.ids])
    inputs["mm_token_type_ids"] = (ids == talker.model.config.image_token_id).int()
    tokens = talker.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=talker.tokenizer.eos_token_id,
        pad_token_id=talker.tokenizer.pad_token_id,
        **inputs,
    )[0, ids.shape[1] :]
    assert answers[0] == talker.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_an_answer_ends_where_the_model_ends_it(talker, monkeypatch):
    free = talker.generate(TEXTS, None, 12)
    last = free[0][6]
    monkeypatch.setattr(talker, "_stop_tokens", lambda: talker.tokenizer(last).input_ids)
    ended = talker.generate(TEXTS, None, 12)
    assert [text.rstrip(last) for text in ended] == [text.partition(last)[0] for text in free]
    assert talker.generate(TEXTS, None, 0) == [""] * 4


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        ([], None, "no prompts"),
        ([" \n"], None, "empty"),
        (["a", "b"], [None], "2 prompts came with 1 images"),
        (["a"], ["cat.png"], "must be a PIL image"),
        (["a"], [Image.new("RGB", (1, 1))], "1x1"),
    ],
)
def test_what_cannot_be_encoded_is_refused(conditioner, texts, images, message):
    with pytest.raises(InputError, match=message):
        conditioner.encode(texts, images)


def test_a_tokenizer_of_another_model_is_refused(conditioner):
    with pytest.raises(CheckpointError, match="image_token_id"):
        Conditioner(
            conditioner.model,
            build_tokenizer(["aa aa"] * 5, 300),
            conditioner.image_processor,
        )


def test_patches_that_were_cut_before_are_seen_alike(conditioner, photos):
    images = [photos[0], None, photos[1], photos[0]]
    now = conditioner.see(images)
    cut = [image if image is None else conditioner.patches(image) for image in images]
    before = conditioner.see(cut)
    for one, other in zip(now.features, before.features, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert [grid is None for grid in before.grids] == [False, True, False, False]
    assert cut[0].pixels.ndim == 2 and cut[0].key == cut[3].key != cut[2].key
