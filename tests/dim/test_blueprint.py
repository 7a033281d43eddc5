from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from dim.blueprint import (
    PLAN_VERSION,
    PROMPT_VERSION,
    SCHEMA,
    TITLES,
    Blueprint,
    parse_answer,
    plan_prompt,
    request_prompt,
)
from dim.errors import BlueprintError

PLAN = Blueprint(
    "Remove the red circle.",
    "A wood table with two objects.",
    "- a red circle, small, on the left\n- a blue square, large, on the right",
    "The red circle on the left goes. The blue square stays.",
    "A wood table with a blue square on the right.",
)


def text(*, number: bool = True, mark: str = "", colon: str = ":", drop: int | None = None) -> str:
    """PLAN as a designer might write it."""
    bodies = (
        PLAN.instruction,
        PLAN.global_layout,
        PLAN.local_objects,
        PLAN.edit_area,
        PLAN.imagination,
    )
    return "\n\n".join(
        f"{f'{n}. ' if number else ''}{mark}{title}{colon}{mark} {body}"
        for n, (title, body) in enumerate(zip(TITLES, bodies, strict=True), 1)
        if n != drop
    )


def test_renders_the_papers_grammar() -> None:
    blocks = PLAN.render().split("\n\n")
    assert len(blocks) == 5
    assert blocks[0] == "1. Edit Instruction: Remove the red circle."
    assert blocks[4].startswith("5. Edited Image Imagination: A wood table")


def test_reads_back_what_it_renders() -> None:
    assert Blueprint.parse(PLAN.render()) == PLAN


def test_reads_back_random_text() -> None:
    rng = random.Random(4)
    alphabet = "ab :*_-\n\r\t#1.)(“é\u2028\x0b<>`"
    for _ in range(300):
        fields = ["x" + "".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in TITLES]
        plan = Blueprint(*fields)
        assert Blueprint.parse(plan.render()) == plan


@pytest.mark.parametrize(
    "answer",
    [
        text(mark="**"),
        text(mark="__"),
        text(number=False),
        text(number=False, mark="**"),
        text().replace(". ", ") ", 1),
        text().lower().replace("remove the red circle.", PLAN.instruction),
        text().replace("2. Global Layout Perception:", "### 2. Global Layout Perception\n"),
        text().replace("2. Global Layout Perception: ", "2. Global Layout Perception\n\n"),
        text().replace("3. Local Object Perception: ", "3. **Local Object Perception:**  \n"),
        text().replace("4. Edit Area Localization: ", "4. Edit Area Localization - "),
        text().replace("4. Edit Area Localization: ", "Step 4: **Edit Area Localization**: "),
        text().replace("\n\n", "\n"),
        text().replace("\n", "\r\n"),
        text().replace("\n\n", "\n\n\n  \n"),
        f"<think>1. Edit Instruction: a draft\nthat does not count</think>\n{text()}",
        f"so far I only thought</think>{text()}",
        f"<think>x</think><answer>\n{text()}\n</answer>",
        f"<answer>{text()}",
        f"```markdown\n{text()}\n```",
        f"Here is the plan:\n\n{text()}",
        f"Alignment: aligned\n\n{text()}",
    ],
)
def test_reads_the_forms_of_real_designers(answer: str) -> None:
    found = Blueprint.parse(answer)
    assert found.instruction == PLAN.instruction
    assert [str(f).casefold() for f in (found.global_layout, found.edit_area)] == [
        PLAN.global_layout.casefold(),
        PLAN.edit_area.casefold(),
    ]
    assert found.local_objects.casefold() == PLAN.local_objects.casefold()
    assert found.imagination.casefold() == PLAN.imagination.casefold()


def each(form: Callable[[int, str, str], str], between: str = "\n\n") -> str:
    """PLAN with every section written by ``form(number, title, text)``."""
    texts = [getattr(PLAN, field.name) for field in fields(PLAN)]
    return between.join(form(n, *pair) for n, pair in enumerate(zip(TITLES, texts, strict=True), 1))


CHINESE = ("编辑指令", "全局布局感知", "局部对象感知", "编辑区域定位", "编辑图像想象")
KEYS = [title.lower().replace(" ", "_") for title in TITLES]
TEXTS = [getattr(PLAN, field.name) for field in fields(PLAN)]
FORMS = {
    "number and title bold": each(lambda n, t, b: f"**{n}. {t}:** {b}"),
    "colon outside of bold": each(lambda n, t, b: f"**{n}. {t}**: {b}"),
    "colon in bold of its own": each(lambda n, t, b: f"{n}. **{t}**:** {b}"),
    "number bold alone": each(lambda n, t, b: f"**{n}.** {t}: {b}"),
    "both bold": each(lambda n, t, b: f"**{n}.** **{t}:** {b}"),
    "italic": each(lambda n, t, b: f"*{n}. {t}:* {b}"),
    "whole sections bold": each(lambda n, t, b: f"**{n}. {t}: {b}**"),
    "hash": each(lambda n, t, b: f"### {n}. {t}\n{b}"),
    "hash without number": each(lambda n, t, b: f"## {t}\n{b}"),
    "hash, bold, rules": each(lambda n, t, b: f"### **{n}. {t}**\n\n{b}\n\n---"),
    "bullet": each(lambda n, t, b: f"- **{t}**: {b}"),
    "round bullet": each(lambda n, t, b: f"• {t}: {b}"),
    "quoted": each(lambda n, t, b: f"> **{n}. {t}:** {b}"),
    "emoji": each(lambda n, t, b: f"📝 **{t}:** {b}"),
    "step": each(lambda n, t, b: f"Step {n}: {t}\n{b}"),
    "bold step": each(lambda n, t, b: f"**Step {n}: {t}**\n{b}"),
    "step with a dash": each(lambda n, t, b: f"Step {n} - {t}: {b}"),
    "section": each(lambda n, t, b: f"## Section {n}: {t}\n\n{b}"),
    "parentheses": each(lambda n, t, b: f"({n}) {t}: {b}"),
    "full-width": each(lambda n, t, b: f"（{n}）【{t}】：{b}"),
    "Chinese comma": each(lambda n, t, b: f"{n}、{t}：{b}"),
    "Chinese titles": each(lambda n, t, b: f"{n}. {CHINESE[n - 1]}：{b}"),
    "no colon": each(lambda n, t, b: f"{n}. {t}\n{b}"),
    "nothing but titles": each(lambda n, t, b: f"{t}\n{b}"),
    "Roman": each(lambda n, t, b: f"{('I', 'II', 'III', 'IV', 'V')[n - 1]}. {t}: {b}"),
    "keycap": each(lambda n, t, b: f"{n}\ufe0f\u20e3 {t}: {b}"),
    "circled": each(lambda n, t, b: f"{'①②③④⑤'[n - 1]} {t}: {b}"),
    "escaped": each(lambda n, t, b: f"{n}\\. {t}: {b}"),
    "brackets": each(lambda n, t, b: f"[{t}]: {b}"),
    "fences": each(lambda n, t, b: f"### {n}. {t}\n```text\n{b}\n```"),
    "code": each(lambda n, t, b: f"{n}. `{t}`: {b}"),
    "quotation marks": each(lambda n, t, b: f'{n}. "{t}": {b}'),
    "a note in the heading": each(lambda n, t, b: f"**{n}. {t} (before):**\n{b}"),
    "capitals": each(lambda n, t, b: f"{n}. {t.upper()}: {b}"),
    "underscores": each(lambda n, t, b: f"{n}. {t.replace(' ', '_')}: {b}"),
    "no-break spaces": each(lambda n, t, b: f"{n}.\xa0{t.replace(' ', chr(0xA0))}: {b}"),
    "all numbered one": each(lambda n, t, b: f"1. {t}: {b}"),
    "space before colon": each(lambda n, t, b: f"{n}. **{t}** : {b}"),
    "indented text": each(lambda n, t, b: f"{n}. **{t}**  \n   " + b.replace("\n", "\n   ")),
    "carriage returns": PLAN.render().replace("\n", "\r\n"),
    "byte order mark": f"\ufeff{PLAN.render()}",
    "British": PLAN.render().replace("Localization", "Localisation"),
    "plural": PLAN.render().replace("Edit Instruction", "Edit Instructions"),
    "misspelt": PLAN.render().replace("Imagination", "Imagining"),
    "shortened": PLAN.render().replace("Global Layout Perception", "Global Layout"),
    "fence in the middle": f"Here is it:\n\n```\n{PLAN.render()}\n```\nLet me know!",
    "fence, then words": f"```markdown\n{PLAN.render()}\n```\n\nHope this helps.",
    "rules between": PLAN.render().replace("\n\n", "\n\n---\n\n"),
    "courtesy": f"Sure!\n\n{PLAN.render()}\n\n---\n\nLet me know if you need more.",
    "answer in open reasoning": f"<think>hm<answer>\n{PLAN.render()}</answer>",
    "answers, one empty": f"<answer>{PLAN.render()}</answer> so: <answer></answer>",
    "a draft, then reasoning closes": "</think>".join(
        (f"{PLAN.render().replace('red', 'green')}<think>hm", "so be it", PLAN.render())
    ),
    "reasoning after": f"{PLAN.render()}\n<think>and so on",
    "end token": f"{PLAN.render()}<|im_end|>",
    "draft and final": "\n\n".join(
        (PLAN.render().replace("red", "green"), "**Final plan**", PLAN.render())
    ),
    "HTML": each(lambda n, t, b: f"<b>{n}. {t}:</b> {b}<br>"),
    "HTML headings": each(lambda n, t, b: f"<h3>{n}. {t}</h3>\n<p>{b}</p>"),
    "entities": PLAN.render().replace(":", "&#58;").replace(" Perc", "&nbsp;Perc"),
    "JSON": json.dumps(dict(zip(KEYS, TEXTS, strict=True))),
    "JSON in a fence": f"Here:\n```json\n{json.dumps(dict(zip(TITLES, TEXTS, strict=True)))}\n```",
    "JSON within JSON": json.dumps({"blueprint": dict(zip(KEYS, TEXTS, strict=True))}),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_a_whole_blueprint_is_lost(form: str) -> None:
    assert Blueprint.parse(FORMS[form]) == PLAN


def test_sections_on_one_line_are_found() -> None:
    found = Blueprint.parse(" ".join(PLAN.render().split()))
    assert found.local_objects == " ".join(PLAN.local_objects.split())
    assert found.imagination == PLAN.imagination


def test_numbers_within_a_section_are_its_text() -> None:
    nested = PLAN.render().replace("- a red", "1. a red").replace("- a blue", "2. a blue")
    assert Blueprint.parse(nested).local_objects.startswith("1. a red circle")


@pytest.mark.parametrize("label", ["", "Instruction: ", "**Instruction:** ", "1. Instruction: "])
def test_an_instruction_without_its_heading_is_section_one(label: str) -> None:
    assert Blueprint.parse(f"{label}{PLAN.instruction}\n\n{text(drop=1)}") == PLAN


@pytest.mark.parametrize(
    "front",
    ["Here is the plan.", "Add the plan below:", "Sure!", "The circle is red.", "Make.", "Add:\nx"],
)
def test_other_words_in_front_are_no_instruction(front: str) -> None:
    with pytest.raises(BlueprintError, match="section 1 .* is missing"):
        Blueprint.parse(f"{front}\n\n{text(drop=1)}")


def test_a_json_list_becomes_bullets() -> None:
    answer = dict(zip(KEYS, TEXTS, strict=True)) | {KEYS[2]: ["a circle", "a square"]}
    assert Blueprint.parse(json.dumps(answer)).local_objects == "- a circle\n- a square"


@pytest.mark.parametrize("form", ["number and title bold", "hash", "nothing but titles", "JSON"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_no_form_hides_a_missing_section(form: str, number: int) -> None:
    if form == "JSON":
        answer = json.loads(FORMS[form])
        del answer[KEYS[number - 1]]
        text = json.dumps(answer)
    else:
        blocks = FORMS[form].split("\n\n")
        text = "\n\n".join(blocks[: number - 1] + blocks[number:])
    with pytest.raises(BlueprintError, match=rf"section {number} .* is missing"):
        Blueprint.parse(text)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (f"<think>{PLAN.render()}", "reasoning"),
        (f"<think>{PLAN.render()}</think>", "empty"),
        (f"<think>{PLAN.render()}</think>I cannot help with that.", "none of the five"),
        (f"{PLAN.render()}\n\nFinal version:\n\n{PLAN.render()[:150]}", "appears 2 times"),
        (FORMS["JSON"][:-40], "JSON that is cut off"),
        (" ".join(PLAN.render().split()).replace("4. Edit Area Localization:", ""), "are missing"),
        (FORMS["HTML"].replace("<b>3. Local Object Perception:</b>", ""), "none of the five"),
        (PLAN.render().replace("Imagination", "Summary"), "section 5 .* is missing"),
    ],
)
def test_lenient_readings_let_nothing_incomplete_through(answer: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        Blueprint.parse(answer)


PIECES = (
    *(
        "```",
        "```json",
        "{",
        "}",
        "\n",
        "\n\n",
        " ",
        "x",
        "- ",
        "**",
        "__",
        "### ",
        "1. ",
        "5) ",
        ":",
    ),
    *(
        "：",
        "---",
        "***",
        "Let me know if so",
        "I hope this helps!",
        "Final version:",
        "<b>",
        "<br>",
    ),
    *("&amp;", "&lt;think&gt;", "<|im_end|>", "<|", "|>", "<think>", "</answer>", "\r\n", "\u2028"),
    *(
        "\xa0",
        "\ufeff",
        "\u200b",
        "Edit Instruction",
        "Edit Instruction:",
        "3. Local Object Percept",
    ),
    *("**4. Edit Area Localization**", "（1）", "I. ", "Step 2: ", "A dog.", "Alignment: aligned"),
)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_can_be_made_or_read_reads_back(seed: int) -> None:
    rng = random.Random(seed)
    headings = [f"{number}. {title}: " for number, title in enumerate(TITLES, 1)]
    read = 0
    for _ in range(400):
        try:
            if rng.random() < 0.5:
                plan = Blueprint(*("".join(rng.choices(PIECES, k=6)) for _ in TITLES))
            else:
                parts = ["".join(rng.choices(PIECES, k=rng.randrange(4))) for _ in range(6)]
                mixed = zip(parts, [*headings, ""], strict=True)
                plan = Blueprint.parse("\n".join(f"{part}\n{title}x" for part, title in mixed))
        except BlueprintError:
            continue
        read += 1
        assert Blueprint.parse(plan.render()) == plan
    assert read > 20


@pytest.mark.parametrize(
    "text", ["\n", " ", "- \n", "<think>", "1" + " " * 50, "*", "1. Edit ", "{"]
)
def test_a_model_that_could_not_stop_takes_no_time(text: str) -> None:
    endless = "x\n" + text * (40_000 // len(text)) + "x"
    started = time.perf_counter()
    with pytest.raises(BlueprintError):
        parse_answer(endless, instruction="x")
    assert time.perf_counter() - started < 5


def test_an_answer_that_stops_in_mid_sentence_is_refused() -> None:
    for cut in ("A wood table. On it lies a blue sq", "The", "- A table.\n- A blue square on"):
        answer = text().replace(PLAN.imagination, cut)
        with pytest.raises(BlueprintError, match=r"section 5 .* stops in mid-sentence"):
            parse_answer(answer, instruction="x")
    for whole in ("A table:\n- a blue square", "A blue square (“large”).", "一张木桌。"):
        answer = text().replace(PLAN.imagination, whole)
        assert parse_answer(answer, instruction="x").blueprint is not None


@pytest.mark.parametrize(
    ("section", "complaint"),
    [("I'm sorry, I can't see it.", "section 2 .* declines"), ("[...]", "section 2 .* no words")],
)
def test_a_section_that_says_nothing_is_refused(section: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        parse_answer(text().replace(PLAN.global_layout, section), instruction="x")


def test_a_bullet_or_sentence_that_names_a_section_is_no_heading() -> None:
    answer = text().replace(
        "The blue square stays.",
        "It stays.\n- Edit Instruction: as given\nEdit area localization is easy here.",
    )
    assert "Edit Instruction: as given" in Blueprint.parse(answer).edit_area


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("", "empty"),
        ("   \n ", "empty"),
        ("I'm sorry, I can't help with editing this image.", "none of the five"),
        ('{"error": "overloaded"}', "none of the five"),
        ("<think>it goes on and on", "reasoning"),
        (text(drop=1), r"section 1 \(Edit Instruction\) is missing"),
        (text(drop=3), r"section 3 \(Local Object Perception\) is missing"),
        (text(drop=5), r"section 5 \(Edited Image Imagination\) is missing"),
        (text()[:200], "are missing"),
        (text() + "\n\n" + text(), "section 1 .* appears 2 times"),
        (text().replace(PLAN.edit_area, ""), r"section 4 \(Edit Area Localization\) is empty"),
        (text().replace(PLAN.imagination, "  "), r"section 5 .* is empty"),
    ],
)
def test_says_what_is_wrong(answer: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        Blueprint.parse(answer)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_refuses_swapped_sections(first: int) -> None:
    blocks = text().split("\n\n")
    blocks[first], blocks[first + 1] = blocks[first + 1], blocks[first]
    with pytest.raises(BlueprintError, match="out of order"):
        Blueprint.parse("\n\n".join(blocks))


def test_refuses_swapped_titles_under_right_numbers() -> None:
    answer = text().replace(TITLES[2], "X").replace(TITLES[3], TITLES[2]).replace("X", TITLES[3])
    with pytest.raises(BlueprintError, match="out of order"):
        Blueprint.parse(answer)


def test_a_known_instruction_stands_in_for_a_missing_first_section() -> None:
    assert Blueprint.parse(text(drop=1), instruction=PLAN.instruction) == PLAN
    assert Blueprint.parse(text(), instruction="another one") == PLAN
    with pytest.raises(BlueprintError, match="section 2"):
        Blueprint.parse(text(drop=2), instruction="x")


def test_a_blueprint_cannot_be_made_that_would_not_read_back() -> None:
    with pytest.raises(BlueprintError, match="section 2 .* is empty"):
        Blueprint("a", " \n", "c", "d", "e")
    with pytest.raises(BlueprintError, match="holds the heading of section 4"):
        Blueprint("a", "b\n4. Edit Area Localization: x", "c", "d", "e")
    with pytest.raises(BlueprintError, match="tag '</think>'"):
        Blueprint("a", "b</think>", "c", "d", "e")


@pytest.mark.parametrize(
    ("line", "alignment"),
    [
        ("Alignment: aligned", "aligned"),
        ("**Alignment:** Partially aligned", "partially aligned"),
        ("Alignment - partially-aligned.", "partially aligned"),
        ("Let me compare.\nAlignment: aligned (fits)", "aligned"),
        ("", "unstated"),
    ],
)
def test_reads_the_alignment_in_front(line: str, alignment: str) -> None:
    answer = parse_answer(f"{line}\n\n{text(mark='**')}", instruction="x")
    assert answer.alignment == alignment
    assert answer.blueprint == PLAN
    assert answer.words == text(mark="**")


@pytest.mark.parametrize("value", ["misaligned", "Misaligned.", "**mis-aligned**", "not aligned"])
def test_misaligned_needs_no_blueprint(value: str) -> None:
    answer = parse_answer(f"Alignment: {value}\nNothing was removed.", instruction="x")
    assert (answer.alignment, answer.blueprint, answer.words) == ("misaligned", None, None)


def test_alignment_counts_in_front_only() -> None:
    answer = parse_answer(text() + "\nAlignment: misaligned", instruction="x")
    assert answer.alignment == "unstated"


def test_words_are_rendered_where_the_first_section_was_missing() -> None:
    answer = parse_answer(text(drop=1), instruction=PLAN.instruction)
    assert answer.words == PLAN.render()


def test_the_request_shows_what_is_asked() -> None:
    alone, pair = request_prompt("Add a hat", False), request_prompt("Add a hat", True)
    for title in TITLES:
        assert title in alone and title in pair
    assert "Add a hat" in alone and "Add a hat" in pair
    assert "Alignment:" in pair and "Alignment:" not in alone
    assert "target" not in alone and "reference" not in alone
    assert len(PROMPT_VERSION) == 12


def test_a_plan_is_asked_for_without_judgement() -> None:
    alone, pair = plan_prompt("Add a hat", False), plan_prompt("Add a hat", True)
    for title in TITLES:
        assert title in alone and title in pair
    assert "Add a hat" in alone and "Add a hat" in pair
    assert "Alignment:" not in pair and "reference" in pair and "reference" not in alone
    assert SCHEMA["required"] == KEYS and len(PLAN_VERSION) == 12


@pytest.mark.parametrize("name", ["imgedit_gpt4o", "imgedit_qwen2.5vl_3b"])
def test_all_real_blueprints_are_read(shared_real: Path, name: str) -> None:
    lines = (shared_real / "blueprints" / f"{name}.jsonl").read_text().splitlines()
    assert len(lines) == 737
    for line in lines:
        record = json.loads(line)
        found = Blueprint.parse(record["blueprint"])
        assert Blueprint.parse(found.render()) == found
        assert not found.global_layout.startswith("*")
        assert parse_answer(record["blueprint"], instruction="").words == record["blueprint"]


_HEADING_LINE = re.compile(rf"^(\d)\. \**({'|'.join(TITLES)}):\** *", re.MULTILINE)


def real_answers(shared_real: Path) -> list[str]:
    """Fifty real answers of each designer."""
    rng = random.Random(0)
    texts = []
    for name in ("imgedit_gpt4o", "imgedit_qwen2.5vl_3b"):
        lines = (shared_real / "blueprints" / f"{name}.jsonl").read_text().splitlines()
        texts += [json.loads(line)["blueprint"] for line in rng.sample(lines, 50)]
    return texts


def cut_at_headings(answer: str) -> list[str]:
    """A real answer in its five parts, each with its heading."""
    starts = [
        m.start() for m in re.finditer(r"^\d\. \**(?:" + "|".join(TITLES) + ")", answer, re.M)
    ]
    assert len(starts) == 5
    return [answer[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def test_damaged_real_blueprints_are_refused(shared_real: Path) -> None:
    for answer in real_answers(shared_real):
        parts = cut_at_headings(answer)
        for number in range(5):
            whole = "".join(parts[:number] + parts[number + 1 :])
            with pytest.raises(BlueprintError, match=rf"section {number + 1} .* is missing"):
                Blueprint.parse(whole)
        for number in range(4):
            swapped = [*parts]
            swapped[number : number + 2] = swapped[number + 1], swapped[number]
            with pytest.raises(BlueprintError, match="out of order"):
                Blueprint.parse("\n\n".join(swapped))
        for broken in (parts[3] + answer, answer + "\n\n" + parts[1]):
            with pytest.raises(BlueprintError):
                Blueprint.parse(broken)
        for refusal in ("I'm sorry, but I can't assist with that request.", "", "null", "{}"):
            with pytest.raises(BlueprintError):
                Blueprint.parse(refusal)


def test_real_blueprints_cut_anywhere_are_refused(shared_real: Path) -> None:
    rng = random.Random(1)
    for answer in real_answers(shared_real):
        last = len(answer) - len(cut_at_headings(answer)[4])
        for length in rng.sample(range(last + 20), 10):
            with pytest.raises(BlueprintError):
                Blueprint.parse(answer[:length])


def test_real_blueprints_cut_in_mid_sentence_are_refused(shared_real: Path) -> None:
    """Within the last section only a sentence that does not end gives it away."""
    rng = random.Random(1)
    cut = refused = 0
    for answer in real_answers(shared_real):
        last = len(answer) - len(cut_at_headings(answer)[4])
        end = rng.randrange(last + 40, len(answer) - 1)
        if answer[end - 1] in ".!?":
            continue
        cut += 1
        try:
            parse_answer(answer[:end], instruction="x")
        except BlueprintError as error:
            refused += "mid-sentence" in str(error)
    assert refused / cut >= 0.95


def test_real_blueprints_are_read_in_whatever_wraps_them(shared_real: Path) -> None:
    for answer in real_answers(shared_real):
        plan = Blueprint.parse(answer)
        for wrapped in (
            f"<think>First, 1. Edit Instruction: a draft.</think>\n\n{answer}",
            f"it goes without an opening tag</think>{answer}",
            f"<think>{answer.replace('The', 'A')}</think><answer>\n{answer}\n</answer>",
            f"<answer>{answer}",
            f"```markdown\n{answer}\n```",
            f"Here is the plan:\n\n```\n{answer}\n```\n\nLet me know!",
            f"Certainly!\n\n{answer}\n\nLet me know if you want anything else.",
            answer.replace("\n", "\r\n"),
            _HEADING_LINE.sub(r"### Step \1: \2\n", answer),
            _HEADING_LINE.sub(r"**\2**\n\n", answer),
        ):
            assert Blueprint.parse(wrapped) == plan
        without = "".join(cut_at_headings(answer)[1:])
        assert Blueprint.parse(without, instruction=plan.instruction) == plan
