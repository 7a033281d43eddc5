"""The page in a real browser: what a person does on it, and what the server is asked for it."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright", reason="the page is tested with playwright (pip: dim[test])")

from axe_core_python.sync_playwright import Axe
from playwright.sync_api import expect

from dim.blueprint import Blueprint
from serving.errors import answer
from tests.serving.page.api_server import Api, blueprint_of, inverted, png

SIZE = (120, 80)
PROMPT = "Make the red circle green"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}


def picture() -> Image.Image:
    """A gradient, no two of whose places look alike."""
    across, down = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    return Image.fromarray(np.stack([across, down, across + down], -1).astype(np.uint8))


def open_image(page: Any, data: bytes | None = None) -> None:
    file = {"name": "table.png", "mimeType": "image/png", "buffer": data or png(picture())}
    page.set_input_files("#file", file)
    expect(page.locator("#stage")).not_to_have_attribute("data-view", "empty")


def said(page: Any, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text)


def wrong(page: Any, text: str) -> None:
    expect(page.locator("#error")).to_have_text(text)


def view(page: Any, name: str) -> None:
    expect(page.locator("#stage")).to_have_attribute("data-view", name)


def paint(page: Any, prompt: str = PROMPT) -> None:
    page.get_by_label("What should change?").fill(prompt)
    page.get_by_role("button", name="Paint").click()
    said(page, "Painted")
    view(page, "compare")


def shown(page: Any, place: str) -> np.ndarray:
    """The pixels of the image in ``#before`` or ``#after``, as they were loaded."""
    data = page.locator(place).evaluate(
        """image => { const canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png"); }"""
    )
    decoded = base64.b64decode(data.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(decoded)).convert("RGB"))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_an_edit_by_mouse_from_image_to_download(page: Any, api: Api) -> None:
    expect(page.locator("#model")).to_have_text("tiny-edit2")
    with page.expect_file_chooser() as chooser:
        page.get_by_text("choose a file").click()
    source = png(picture())
    chooser.value.set_files({"name": "table.png", "mimeType": "image/png", "buffer": source})
    paint(page)

    call = api.last("/v1/images/edits")
    assert call.files["image"] == source
    assert call.fields == {
        "prompt": PROMPT, "designer": "fast", "stream": "true", "partial_images": "3",
    }  # fmt: skip
    for number, value in enumerate(vars(blueprint_of(PROMPT)).values(), 1):
        expect(page.locator("#sections textarea").nth(number - 1)).to_have_value(value)
    assert (shown(page, "#before") == np.asarray(picture())).all()
    assert (shown(page, "#after") == np.asarray(inverted(picture(), None))).all()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "draw-in-mind-2.png"
    assert (decoded(download.value.path().read_bytes()) == 255 - np.asarray(picture())).all()


def test_the_whole_edit_by_keyboard(page: Any, api: Api) -> None:
    """No pointer: every step is reached by Tab from the one before it, and seen to have focus."""

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                assert name in ("file", "split") or page.evaluate(outline) == "solid"
                return
        raise AssertionError(f"Tab does not reach {name}")

    file = {"name": "a.png", "mimeType": "image/png", "buffer": png(picture())}
    page.on("filechooser", lambda chooser: chooser.set_files(file))
    tab_to("file")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type(PROMPT)
    tab_to("plan")
    page.keyboard.press("Enter")
    said(page, "The blueprint is written")
    tab_to("section-edit_area")
    page.keyboard.press("Control+A")
    page.keyboard.type("Only the circle.")
    page.keyboard.press("Control+Enter")
    said(page, "Painted")
    assert "4. Edit Area Localization: Only the circle." in api.last("/v1/images/edits").fields[
        "blueprint"
    ]  # fmt: skip

    page.locator("body").evaluate("() => document.activeElement.blur()")
    tab_to("split")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#split")).to_have_attribute("aria-valuetext", "60 % before, 40 % after")
    assert "60%" in page.locator("#figure").evaluate("f => f.style.getPropertyValue('--split')")
    tab_to("redo")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    view(page, "image")


def test_the_blueprint_is_seen_while_it_is_written(page: Any, api: Api) -> None:
    open_image(page)
    api.hold.clear()
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Write blueprint").click()
    said(page, "Writing the blueprint…")
    expect(page.locator("#sections")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#sections")).to_be_visible()
    expect(page.locator("#section-imagination")).to_have_value("")
    api.hold.set()
    said(page, "The blueprint is written")
    expect(page.locator("#section-imagination")).to_have_value(blueprint_of(PROMPT).imagination)
    assert api.last("/v1/blueprints").fields["prompt"] == PROMPT


def test_a_blueprint_edited_in_place_is_what_is_sent(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Write blueprint").click()
    said(page, "The blueprint is written")
    mine = "The circle,\nand nothing “else” <b>at all</b>."
    page.get_by_label("4. Edit Area Localization").fill(mine)
    page.get_by_role("button", name="Paint").click()
    said(page, "Painted")
    sent = Blueprint.parse(api.last("/v1/images/edits").fields["blueprint"])
    assert sent == Blueprint(**{**vars(blueprint_of(PROMPT)), "edit_area": mine})


def test_the_section_that_is_wrong_is_named_and_not_painted(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Write blueprint").click()
    said(page, "The blueprint is written")
    field = page.get_by_label("3. Local Object Perception")
    field.fill("  ")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#wrong-local_objects")).to_have_text(
        "Section 3 (Local Object Perception) is empty."
    )
    page.get_by_role("button", name="Paint").click()
    wrong(page, "The blueprint cannot be painted as it is.")
    expect(field).to_be_focused()
    assert all(call.path != "/v1/images/edits" for call in api.calls)
    field.fill("A circle.")
    expect(field).to_have_attribute("aria-invalid", "false")
    page.get_by_role("button", name="Paint").click()
    said(page, "Painted")


def test_another_instruction_gets_another_blueprint_unless_it_is_kept(page: Any, api: Api) -> None:
    open_image(page)
    paint(page)
    paint(page, "Now make it blue")
    assert "blueprint" not in api.last("/v1/images/edits").fields
    expect(page.locator("#section-instruction")).to_have_value("Now make it blue")
    page.get_by_label("What should change?").fill("As before")
    page.get_by_role("button", name="Keep it for this instruction").click()
    page.get_by_role("button", name="Paint").click()
    expect(page.locator("#history li")).to_have_count(4)
    kept = blueprint_of("Now make it blue").render()
    assert api.last("/v1/images/edits").fields["blueprint"] == kept


def test_a_mask_reaches_the_server_transparent_where_it_was_drawn(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_role("button", name="Mark area").click()
    box = page.locator("#mask").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    page.mouse.move(*at(0.25, 0.5))
    page.mouse.down()
    page.mouse.move(*at(0.75, 0.5), steps=5)
    page.mouse.up()
    said(page, "of the image is marked")
    page.get_by_label("Erase").check()
    page.mouse.click(*at(0.5, 0.5))
    paint(page)

    mask = decoded(api.last("/v1/images/edits").files["mask"])
    assert mask.shape == (SIZE[1], SIZE[0], 4)
    alpha = mask[..., 3]
    assert set(np.unique(alpha)) == {0, 255}
    assert alpha[40, 32] == alpha[40, 88] == 0
    assert alpha[40, 60] == 255  # erased
    assert alpha[5, 60] == alpha[75, 60] == alpha[40, 5] == alpha[40, 115] == 255
    changed = (shown(page, "#after") != np.asarray(picture())).any(axis=-1)
    assert (changed <= (alpha == 0)).all() and changed.any()
    expect(page.locator("#mask")).to_have_attribute("data-drawn", "")  # the result has none yet


def test_a_mask_can_be_drawn_by_keyboard(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_role("button", name="Mark area").click()
    expect(page.locator("#mask")).to_be_focused()
    page.keyboard.press("[")
    expect(page.locator("#brush")).to_have_value("10")
    page.keyboard.press("Space")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowRight")
    said(page, "of the image is marked")
    page.get_by_label("What should change?").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    said(page, "Painted")
    alpha = decoded(api.last("/v1/images/edits").files["mask"])[..., 3]
    assert alpha[40, 60] == alpha[40, 80] == 0
    assert alpha[40, 20] == alpha[10, 60] == 255

    page.get_by_role("button", name="Redo this turn").click()
    expect(page.locator("#mask")).to_have_attribute("data-drawn", "yes")
    page.get_by_role("button", name="Mark area").click()
    page.get_by_role("button", name="Clear").click()
    said(page, "Nothing is marked")
    page.get_by_role("button", name="Paint").click()
    said(page, "Painted")
    assert "mask" not in api.last("/v1/images/edits").files


def test_the_result_is_the_next_source_and_any_turn_can_be_gone_back_to(
    page: Any, api: Api
) -> None:
    open_image(page)
    paint(page, "first")
    paint(page, "second")
    second = api.last("/v1/images/edits").files["image"]
    assert (decoded(second) == 255 - np.asarray(picture())).all()
    turns = page.get_by_role("region", name="History").get_by_role("button")
    expect(turns).to_have_text(["1: table.png", "2: first, from 1", "3: second, from 2"])
    turns.nth(0).click()
    expect(turns.nth(0)).to_have_attribute("aria-current", "true")
    view(page, "image")
    paint(page, "third")
    assert (decoded(api.last("/v1/images/edits").files["image"]) == np.asarray(picture())).all()
    expect(turns.nth(3)).to_have_text("4: third, from 1")
    turns.nth(1).click()
    view(page, "compare")
    expect(page.locator("#section-instruction")).to_have_value("first")


def test_the_next_instruction_can_be_written_while_it_paints(page: Any, api: Api) -> None:
    open_image(page)
    api.hold.clear()
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    view(page, "painting")
    page.get_by_label("What should change?").fill("And then this")
    api.hold.set()
    said(page, "Painted")
    expect(page.get_by_label("What should change?")).to_have_value("And then this")
    expect(page.locator("#blueprint-note")).to_contain_text(f"Written for “{PROMPT}”")


def test_several_results_are_a_gallery_to_choose_from(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Images").fill("3")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Steps").fill("5")
    page.get_by_label("Guidance").fill("3.5")
    page.get_by_label("Not in the image").fill("blur")
    page.get_by_label("Designer").select_option("best")
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    said(page, "3 images are painted")
    fields = api.last("/v1/images/edits").fields
    assert (fields["n"], fields["seed"], fields["steps"]) == ("3", "7", "5")
    assert (fields["guidance_scale"], fields["negative_prompt"]) == ("3.5", "blur")
    assert fields["designer"] == "best"
    gallery = page.get_by_role("group", name="Results").get_by_role("radio")
    expect(gallery).to_have_count(3)
    gallery.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(gallery.nth(1)).to_be_checked()
    expect(page.get_by_role("group", name="Results")).to_contain_text("2, seed 8")


def test_rounds_are_shown_with_what_the_designer_said(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Images").fill("3")
    page.get_by_label("Rounds").fill("2")
    page.get_by_label("Best of").fill("2")
    expect(page.get_by_label("Images")).to_be_disabled()
    paint(page)
    said(page, "Painted in 2 rounds.")
    fields = api.last("/v1/images/edits").fields
    assert fields == {
        "prompt": PROMPT, "rounds": "2", "best_of": "2", "designer": "fast", "stream": "true",
    }  # fmt: skip

    looked = page.get_by_role("group", name="Results").locator("label")
    expect(looked).to_have_text([
        "Round 1: 3 of 10. The circle is still red, <b>0</b>.",
        "Round 1: 4 of 10. The circle is still red, <b>1</b>.",
        "Round 2: 9 of 10, accepted",
        "Round 2: 6 of 10. The circle is still red, <b>3</b>.",
    ])  # fmt: skip
    expect(looked.nth(2).get_by_role("radio")).to_be_checked()  # the answer, not the last
    assert (shown(page, "#after") == np.asarray(inverted(picture(), None, 0.6))).all()
    imagination = page.locator("#section-imagination")
    expect(imagination).to_have_value(re.compile("in the evening"))
    looked.nth(0).get_by_role("radio").check()
    assert (shown(page, "#after") == np.asarray(inverted(picture(), None, 0.2))).all()
    expect(imagination).to_have_value(re.compile("in the same light"))

    # The next edit begins from the image that is chosen, and the rounds stay in the history.
    page.get_by_label("Rounds").fill("1")
    page.get_by_label("Best of").fill("1")
    page.get_by_label("Images").fill("1")
    paint(page, "and then")
    assert "rounds" not in api.last("/v1/images/edits").fields
    sent = decoded(api.last("/v1/images/edits").files["image"])
    assert (sent == np.asarray(inverted(picture(), None, 0.2))).all()
    expect(page.get_by_role("group", name="Results")).to_be_hidden()
    page.get_by_role("region", name="History").get_by_role("button").nth(1).click()
    expect(looked).to_have_count(4)


def test_rounds_that_break_off_leave_what_was_looked_at(page: Any, api: Api) -> None:
    api.breaks = "cut"
    open_image(page)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Rounds").fill("2")
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    wrong(page, "The connection ended before the best image was chosen.")
    looked = page.get_by_role("group", name="Results").get_by_role("radio")
    expect(looked).to_have_count(2)
    expect(looked.nth(1)).to_be_checked()


def test_nothing_is_created_in_rounds(page: Any, api: Api) -> None:
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Rounds").fill("3")
    page.get_by_label("Create").check()
    expect(page.get_by_label("Rounds")).to_be_hidden()
    page.get_by_label("Images").fill("2")
    page.get_by_label("What should the image show?").fill("a grey ramp")
    page.get_by_role("button", name="Paint").click()
    said(page, "2 images are painted")
    fields = api.last("/v1/images/generations").fields
    assert fields["n"] == 2 and "rounds" not in fields


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("cut", "Only 2 of 3 images came before the connection ended."),
        ("error", "The painter fell over."),
    ],
)
def test_images_that_came_before_a_failure_are_kept(
    page: Any, api: Api, way: str, sentence: str
) -> None:
    api.breaks = way
    open_image(page)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Images").fill("3")
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    wrong(page, sentence)
    said(page, "2 images are painted")
    expect(page.get_by_role("group", name="Results").locator("label")).to_have_text(
        ["1, seed 101", "2, seed 102"]
    )


def test_without_a_designer_the_instruction_is_painted(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Designer").select_option("none")
    expect(page.get_by_role("button", name="Write blueprint")).to_be_hidden()
    paint(page)
    assert api.last("/v1/images/edits").fields["designer"] == "none"
    expect(page.locator("#sections")).to_be_hidden()


def test_an_image_is_created_from_a_text_and_then_edited(page: Any, api: Api) -> None:
    page.get_by_label("Create").check()
    page.get_by_label("What should the image show?").fill("a grey ramp")
    page.get_by_role("button", name="Paint").click()
    said(page, "Painted.")
    call = api.last("/v1/images/generations")
    assert call.fields == {"prompt": "a grey ramp", "stream": True, "partial_images": 3}
    view(page, "image")
    created = shown(page, "#before")
    page.get_by_role("button", name="Edit this image").click()
    paint(page)
    assert (decoded(api.last("/v1/images/edits").files["image"]) == created).all()


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(page: Any, api: Api, way: str) -> None:
    page.evaluate(
        """([way, data]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "mine.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(way === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
                : new DragEvent("drop", { ...options, dataTransfer: transfer }));
        }""",
        [way, base64.b64encode(png(picture())).decode()],
    )
    view(page, "image")
    assert (shown(page, "#before") == np.asarray(picture())).all()


def test_what_is_no_image_is_said_and_nothing_is_lost(page: Any, api: Api) -> None:
    page.get_by_role("button", name="Paint").click()
    wrong(page, "Choose an image first.")
    expect(page.locator("#file")).to_be_focused()
    open_image(page)
    file = {"name": "a.png", "mimeType": "image/png", "buffer": b"not a picture"}
    page.set_input_files("#file", file)
    wrong(page, "This file is not an image that a browser can show.")
    view(page, "image")
    page.get_by_role("button", name="Paint").click()
    wrong(page, "Say what should change.")
    expect(page.locator("#prompt")).to_be_focused()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Images").fill("11")
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    expect(page.locator("#error")).to_contain_text("Images: ")
    expect(page.get_by_label("Images")).to_be_focused()
    assert api.calls == []


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (answer(400, "steps: at most 100", "x"), "Steps: at most 100."),
        (answer(429, "too much is waiting", "x", retry_after_s=7),
         "Too much is waiting (try again in 7 s)."),
        (answer(502, "<img src=x onerror=alert(1)> failed", "x"),
         "<img src=x onerror=alert(1)> failed."),
        (answer(500, "", "x"), "The server answered with status 500."),
        ("error", "The painter fell over."),
        ("cut", "The connection ended before the image was finished."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_failure_is_one_sentence_and_the_form_stays(
    page: Any, api: Api, failure: Any, sentence: str
) -> None:
    if isinstance(failure, str):
        api.breaks = failure
    else:
        api.failures.append(failure)
    open_image(page)
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    wrong(page, sentence)
    assert page.locator("#error").get_attribute("role") == "alert"
    expect(page.get_by_label("What should change?")).to_have_value(PROMPT)
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    api.breaks = None
    page.get_by_role("button", name="Paint").click()
    said(page, "Painted")
    wrong(page, "")


def test_a_server_that_is_gone_is_said(page: Any, api: Api) -> None:
    open_image(page)
    page.get_by_label("What should change?").fill(PROMPT)
    page.route("**/v1/images/edits", lambda route: route.abort())
    page.get_by_role("button", name="Paint").click()
    wrong(page, "The server cannot be reached.")


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_cancelling_ends_the_request(page: Any, api: Api, way: str) -> None:
    open_image(page)
    api.hold.clear()
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    view(page, "painting")
    if way == "button":
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("button", name="Paint")).to_be_focused()
    else:
        page.keyboard.press("Escape")
    said(page, "Cancelled.")
    assert api.gone.wait(10)
    view(page, "image")
    expect(page.locator("#sections")).to_be_hidden()  # what was half written is no blueprint
    api.hold.set()
    paint(page)


def test_an_api_key_is_asked_for_and_kept_in_this_tab_only(page: Any, api: Api) -> None:
    open_image(page)
    api.key = "secret-1"
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Paint").click()
    wrong(page, "An API key is needed.")
    field = page.get_by_label("This server asks for an API key")
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    field.fill("secret-1")
    page.keyboard.press("Enter")
    said(page, "Painted")  # what was asked for is done now
    assert api.last("/v1/images/edits").headers["authorization"] == "Bearer secret-1"
    expect(field).to_be_hidden()
    assert page.evaluate("Object.values(sessionStorage)") == ["secret-1"]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny-edit2")


def test_a_server_with_keys_asks_at_the_start(open_page: Callable[..., Any], api: Api) -> None:
    api.key = "secret-1"
    page = open_page()
    page.get_by_label("This server asks for an API key").fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    wrong(page, "An API key is needed.")
    page.get_by_label("This server asks for an API key").fill("secret-1")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model")).to_have_text("tiny-edit2")
    wrong(page, "")


def accepting(page: Any) -> Any:
    return page.get_by_role("button", name="Accept for training")


def test_where_nothing_is_kept_nobody_is_asked(page: Any, api: Api) -> None:
    open_image(page)
    paint(page)
    expect(page.locator("#consent-field")).to_be_hidden()
    expect(page.locator("#accept")).to_be_hidden()
    assert "consent" not in api.last("/v1/images/edits").fields


def test_an_edit_is_accepted_for_training_and_taken_back(
    open_page: Callable[..., Any], api: Api
) -> None:
    api.contributions = "ask"
    page = open_page()
    open_image(page)
    consent = page.get_by_label("Let this model learn from edits that I accept")
    expect(consent).not_to_be_checked()
    paint(page)
    assert "consent" not in api.last("/v1/images/edits").fields
    expect(page.locator("#accept")).to_be_hidden()  # nobody has consented

    consent.check()
    paint(page)
    assert api.last("/v1/images/edits").fields["consent"] == "true"
    accepting(page).click()
    said(page, "Accepted: this edit is kept for training.")
    expect(page.locator("#accept")).to_be_focused()
    expect(page.locator("#accept")).to_have_text("Take back from training")
    page.keyboard.press("Enter")
    said(page, "Taken back: nothing of this edit is kept.")
    expect(page.get_by_role("button", name="Redo this turn")).to_be_focused()
    expect(page.locator("#accept")).to_be_hidden()
    paths = [call.path for call in api.calls if "contributions" in call.path]
    assert paths == [
        "POST /v1/contributions/name%2F1/accept", "DELETE /v1/contributions/name%2F1",
    ]  # fmt: skip
    turns = page.get_by_role("region", name="History").get_by_role("button")
    turns.nth(1).click()
    expect(page.locator("#accept")).to_be_hidden()
    page.get_by_label("Create").check()
    expect(consent).to_be_hidden()


def test_the_image_that_the_designer_chose_is_accepted(
    open_page: Callable[..., Any], api: Api
) -> None:
    api.contributions = "always"
    page = open_page()
    open_image(page)
    consent = page.get_by_label("Let this model learn from edits that I accept")
    expect(consent).to_be_checked()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Rounds").fill("2")
    paint(page)
    assert "consent" not in api.last("/v1/images/edits").fields  # the key has said it
    expect(accepting(page)).to_be_visible()
    looked = page.get_by_role("group", name="Results").get_by_role("radio")
    looked.nth(0).check()
    expect(page.locator("#accept")).to_be_hidden()  # it is not the one that the server holds
    looked.nth(1).check()
    expect(accepting(page)).to_be_visible()
    consent.uncheck()
    paint(page)
    assert api.last("/v1/images/edits").fields["consent"] == "false"
    expect(page.locator("#accept")).to_be_hidden()


def test_an_edit_that_is_forgotten_cannot_be_accepted(
    open_page: Callable[..., Any], api: Api
) -> None:
    api.contributions = "always"
    page = open_page()
    open_image(page)
    paint(page)
    api.failures.append(answer(503, "the object store does not answer", "x"))
    accepting(page).click()
    wrong(page, "The object store does not answer.")
    api.failures.append(answer(404, "there is no contribution", "x"))
    accepting(page).click()  # it is there still
    wrong(page, "It is too late to accept this edit: the server has forgotten it.")
    expect(page.locator("#accept")).to_be_hidden()


def test_the_request_can_be_copied_as_curl_and_as_python(
    open_page: Callable[..., Any], api: Api
) -> None:
    api.contributions = "always"
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Let this model learn").uncheck()  # is not for whoever runs the copy to say
    prompt = 'It\'s @home, "so" \\ to say'
    open_image(page)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seed").fill("7")
    paint(page, prompt)
    blueprint = blueprint_of(prompt).render()

    page.get_by_role("button", name="Copy as curl").click()
    said(page, "Copied.")
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:2] == ["curl", f"{api.url}/v1/images/edits"]
    fields = [words[at + 1] for at, word in enumerate(words) if word == "--form-string"]
    assert fields == [
        f"prompt={prompt}", f"blueprint={blueprint}", "seed=7", "designer=fast",
    ]  # fmt: skip
    assert words[words.index("-F") + 1] == "image=@image.png"

    page.get_by_role("button", name="Copy as Python").click()
    said(page, "Copied.")
    code = page.evaluate("navigator.clipboard.readText()")
    compile(code, "copied", "exec")
    assert f"prompt={json.dumps(prompt, ensure_ascii=False)}" in code
    extra = re.search(r"extra_body=(\{.*\}),\n", code)
    assert extra is not None
    assert json.loads(extra[1]) == {"blueprint": blueprint, "seed": 7, "designer": "fast"}


def test_without_a_clipboard_the_code_is_shown(page: Any, api: Api) -> None:
    open_image(page)
    paint(page)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("dialog", name="Copy this").get_by_role("textbox")).to_have_value(
        re.compile("^curl ")
    )
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"]
)
def test_axe_finds_nothing_at_any_stage(
    open_page: Callable[..., Any], api: Api, viewport: dict[str, int], scheme: str
) -> None:
    api.contributions = "ask"
    page = open_page(color_scheme=scheme, viewport=viewport, reduced_motion="reduce")

    def look() -> None:
        found = Axe().run(page)["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], "the page scrolls sideways"

    look()
    open_image(page)
    page.get_by_role("button", name="Mark area").click()
    look()
    page.get_by_role("button", name="Mark area").click()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Images").fill("2")
    page.get_by_label("What should change?").fill(PROMPT)
    page.get_by_role("button", name="Write blueprint").click()
    said(page, "The blueprint is written")
    page.get_by_label("3. Local Object Perception").fill("")
    expect(page.locator("#wrong-local_objects")).not_to_be_empty()
    look()
    page.get_by_label("3. Local Object Perception").fill("A circle.")
    api.failures.append(answer(401, "an API key is needed", "x"))
    page.get_by_role("button", name="Paint").click()
    expect(page.locator("#key-form")).to_be_visible()
    look()
    page.get_by_label("Let this model learn").check()
    page.get_by_role("button", name="Use this key").click()
    said(page, "2 images are painted")
    expect(accepting(page)).to_be_visible()
    look()
    page.get_by_label("Rounds").fill("2")
    paint(page)
    said(page, "Painted in 2 rounds.")
    look()
    page.get_by_label("Create").check()
    look()


def test_the_policy_stops_what_is_not_the_page_s_own(browser: Any, api: Api) -> None:
    """An injected script, a style, a request elsewhere: refused by the browser, and reported."""
    page = browser.new_page()
    page.goto(api.url)
    blocked = page.evaluate(
        """async () => {
            const found = [];
            document.addEventListener("securitypolicyviolation",
                (event) => found.push(event.effectiveDirective));
            const script = document.createElement("script");
            try { script.textContent = "document.title = 'mine'"; } catch { found.push("script"); }
            const style = document.createElement("style");
            style.textContent = "body { display: none }";
            document.head.append(style);
            await fetch("http://127.0.0.1:9/").catch(() => {});
            await new Promise((done) => setTimeout(done, 100));
            return found;
        }"""
    )
    assert {"script", "style-src-elem", "connect-src"} <= set(blocked)
    assert page.locator("body").is_visible()
    page.close()
