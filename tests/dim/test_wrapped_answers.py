"""Plans in every wrapping that models and servers put around them: read whole, or refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from dim.blueprint import SCHEMA, TITLES, Blueprint, parse_answer
from dim.errors import BlueprintError
from dim.reading import as_reasoning

KEYS = tuple(SCHEMA["required"])
CHINESE = ("编辑指令", "全局布局感知", "局部对象感知", "编辑区域定位", "编辑图像想象")
PLAN = Blueprint(
    'Put a sign that says "{SALE}" on the table.',
    "A table; on the left a cup, on the right a café's menu.",
    '- a cup, red, with the words "STOP", "GO"\n- a menu: "[NEW] {soup}", 5 lines',
    'The middle of the table. The cup\'s handle and the "OPEN" plate stay.',
    'A table with a sign, "{SALE}", between the cup and the menu.',
)

Wrap = Callable[[Blueprint], str]


def fields(plan: Blueprint, keys: tuple[str, ...] = KEYS) -> dict[str, str]:
    return dict(zip(keys, astuple(plan), strict=True))


def pretty(plan: Blueprint, keys: tuple[str, ...] = KEYS, **options: object) -> str:
    return json.dumps(fields(plan, keys), indent=2, **options)  # type: ignore[arg-type]


def each(plan: Blueprint, form: Callable[[str, str], str], between: str = ",\n") -> str:
    """An object with every field written by ``form(key, text)``."""
    body = between.join(f"  {form(key, text)}" for key, text in fields(plan).items())
    return f"{{\n{body}\n}}"


def numbered(form: str) -> tuple[str, ...]:
    return tuple(form.format(n=n, t=title) for n, title in enumerate(TITLES, 1))


def camel(key: str) -> str:
    return "".join(word.title() for word in key.split("_"))


def listed(plan: Blueprint) -> list[dict[str, object]]:
    pairs = enumerate(zip(TITLES, astuple(plan), strict=True), 1)
    return [{"number": n, "title": title, "content": text} for n, (title, text) in pairs]


DRAFT = Blueprint(*["A draft."] * 5)
WRAPPINGS: dict[str, Wrap] = {
    "one line": lambda p: json.dumps(fields(p)),
    "many lines": pretty,
    "its own letters": lambda p: pretty(p, ensure_ascii=False),
    "words before": lambda p: f"Here is the plan that you asked for:\n\n{pretty(p)}",
    "words on its line": lambda p: f"Sure! {pretty(p)} Anything else?",
    "words with braces": lambda p: f"I see {{SALE}} and [x: 1].\n{pretty(p)}\nThe {{end}}.",
    "words after": lambda p: f"{pretty(p)}\n\nLet me know if you need more.",
    "fence": lambda p: f"```json\n{pretty(p)}\n```",
    "fence of another kind, words": lambda p: f"Plan:\n```JSON5\n{pretty(p)}\n```\nDone.",
    "tildes": lambda p: f"~~~json\n{pretty(p)}\n~~~",
    "four ticks": lambda p: f"````\n{pretty(p)}\n````",
    "fence on one line": lambda p: f"```json{json.dumps(fields(p))}```",
    "fence that stays open": lambda p: f"```\n{pretty(p)}",
    "after reasoning": lambda p: f"<think>Say {pretty(DRAFT)}?</think>\n{pretty(p)}",
    "after reasoning opened in the prompt": lambda p: f"{pretty(DRAFT)}</think>{pretty(p)}",
    "in answer": lambda p: f"<think>hm {{</think><answer>\n{pretty(p)}</answer>",
    "in answer in open reasoning": lambda p: f"<think>hm<answer>{pretty(p)}</answer>",
    "in an element": lambda p: f"<plan>\n{pretty(p)}\n</plan>",
    "in a box": lambda p: f"<|begin_of_box|>{pretty(p)}<|end_of_box|>",
    "in a boxed formula": lambda p: f"$\\boxed{{{pretty(p)}}}$",
    "in brackets of a template": lambda p: f"{{{pretty(p)}}}",
    "reasoning between triangles": lambda p: f"◁think▷{pretty(DRAFT)}◁/think▷{pretty(p)}",
    "reasoning between brackets": lambda p: f"[THINK]{pretty(DRAFT)}[/THINK]{pretty(p)}",
    "in a channel": lambda p: (
        f"<|channel|>analysis<|message|>{pretty(DRAFT)}<|end|><|start|>assistant"
        f"<|channel|>final <|constrain|>json<|message|>{pretty(p)}<|return|>"
    ),
    "wide end token": lambda p: f"{pretty(p)}<｜end▁of▁sentence｜>",
    "tool call": lambda p: (
        "<tool_call>\n" + json.dumps({"name": "plan", "arguments": fields(p)}) + "\n</tool_call>"
    ),
    "arguments as text": lambda p: json.dumps(
        {"tool_calls": [{"function": {"name": "plan", "arguments": json.dumps(fields(p))}}]}
    ),
    "encoded twice": lambda p: json.dumps(pretty(p)),
    "encoded thrice": lambda p: json.dumps(json.dumps(pretty(p))),
    "encoded twice after words": lambda p: f"Result: {json.dumps(pretty(p))}",
    "encoded twice without quotes": lambda p: json.dumps(pretty(p))[1:-1],
    "text encoded": lambda p: json.dumps(p.render()),
    "text encoded after words": lambda p: f"Plan: {json.dumps(p.render())}",
    "text encoded without quotes": lambda p: json.dumps(p.render())[1:-1],
    "array of one": lambda p: json.dumps([fields(p)], indent=2),
    "array of sections": lambda p: json.dumps([{k: v} for k, v in fields(p).items()], indent=2),
    "a line per section": lambda p: "\n".join(json.dumps({k: v}) for k, v in fields(p).items()),
    "under a key": lambda p: json.dumps({"blueprint": fields(p)}, indent=2),
    "under keys": lambda p: json.dumps({"ok": True, "result": {"output": fields(p)}}),
    "text under a key": lambda p: json.dumps({"note": "as asked", "answer": p.render()}),
    "content parts": lambda p: json.dumps([{"type": "text", "text": p.render()}]),
    "a completion": lambda p: json.dumps({"choices": [{"message": {"content": pretty(p)}}]}),
    "array of texts": lambda p: json.dumps(p.render().split("\n\n"), indent=2),
    "in two groups": lambda p: json.dumps(
        {
            "perception": {key: fields(p)[key] for key in KEYS[1:3]},
            "plan": {key: fields(p)[key] for key in (KEYS[0], *KEYS[3:])},
        }
    ),
    "titles": lambda p: pretty(p, TITLES),
    "numbered titles": lambda p: pretty(p, numbered("{n}. {t}")),
    "decorated titles": lambda p: pretty(p, numbered("**Step {n}: {t}**")),
    "numbered keys": lambda p: pretty(p, tuple(f"{n}_{k}" for n, k in enumerate(KEYS, 1))),
    "section keys": lambda p: pretty(p, tuple(f"section_{n}_{k}" for n, k in enumerate(KEYS, 1))),
    "PascalCase": lambda p: pretty(p, tuple(map(camel, KEYS))),
    "camelCase": lambda p: pretty(p, tuple(k[0] + camel(k)[1:] for k in KEYS)),
    "kebab-case": lambda p: pretty(p, tuple(k.replace("_", "-") for k in KEYS)),
    "run together": lambda p: pretty(p, tuple(k.replace("_", "") for k in KEYS)),
    "capitals": lambda p: pretty(p, tuple(map(str.upper, KEYS))),
    "Chinese": lambda p: pretty(p, CHINESE, ensure_ascii=False),
    "Chinese, escaped and numbered": lambda p: pretty(
        p, tuple(f"{n}、{c}" for n, c in enumerate(CHINESE, 1))
    ),
    "names of the fields": lambda p: pretty(p, tuple(Blueprint.__dataclass_fields__)),
    "short names": lambda p: pretty(
        p, ("Instruction", "Global Layout", "Local Objects", "Edit Area", "Imagination")
    ),
    "sections in a list": lambda p: json.dumps({"sections": listed(p)}, indent=2),
    "sections by number": lambda p: json.dumps({s["number"]: s for s in listed(p)}),
    "objects with a text": lambda p: json.dumps({k: {"text": v} for k, v in fields(p).items()}),
    "heading repeated": lambda p: pretty(
        Blueprint.parse(p.render())
    ).replace('": "', '": "%s: ') % tuple(numbered("{n}. {t}")),
    "draft under a key": lambda p: json.dumps({"draft": fields(DRAFT), "plan": fields(p)}),
    "final under a key": lambda p: json.dumps({"final_plan": fields(p), "first": fields(DRAFT)}),
    "draft before": lambda p: f"First:\n{pretty(DRAFT)}\n\nOn reflection:\n{pretty(p)}",
    "more than asked": lambda p: json.dumps({"reasoning": "{x}", **fields(p), "sure": 0.9}),
    "comma too many": lambda p: f"{pretty(p)[:-2]},\n}}",
    "Python": lambda p: repr(fields(p)),
    "Python, assigned": lambda p: f"plan = {fields(p)!r}\nprint(plan)",
    "Python texts": lambda p: each(p, lambda k, v: f"'{k}': '''{v}'''"),
    "line ends as they are": lambda p: each(
        p, lambda k, v: f'"{k}": "' + v.replace('"', '\\"') + '"'
    ),
    "quotes as they are": lambda p: each(p, lambda k, v: f'"{k}": "{v}"'),
    "bare keys": lambda p: each(p, lambda k, v: f"{k}: {json.dumps(v)}"),
    "curly quotes": lambda p: each(p, lambda k, v: f"“{k}”: “{v}”"),
    "comments": lambda p: each(p, lambda k, v: f"{json.dumps(k)}: {json.dumps(v)} /* {k} */"),
    "comma too few": lambda p: each(p, lambda k, v: f'"{k}": {json.dumps(v)}', "\n"),
    "escaped once too often": lambda p: each(
        p, lambda k, v: f'"{k}": ' + json.dumps(v.replace('"', '\\"').replace("\n- ", "\\n- "))
    ),
    "carriage returns": lambda p: pretty(p).replace("\n", "\r\n"),
    "no-break spaces": lambda p: pretty(p).replace("\n  ", "\n\xa0 "),
    "elements by name": lambda p: "".join(f"<{k}>{v}</{k}>\n" for k, v in fields(p).items()),
    "elements in one": lambda p: (
        "<blueprint>\n" + "".join(f"<{k}>\n{v}\n</{k}>\n" for k, v in fields(p).items())
        + "</blueprint>"
    ),
    "text in an element": lambda p: f"Here:\n<plan>\n{p.render()}\n</plan>\nDone.",
    "YAML": lambda p: "".join(f"{k}: {json.dumps(v)}\n" for k, v in fields(p).items()),
    "YAML blocks": lambda p: "".join(
        f"{k}: |\n  " + v.replace("\n", "\n  ") + "\n" for k, v in fields(p).items()
    ),
}  # fmt: skip

OPEN_ENDED = ("YAML blocks", "text in an element", "elements in one", "text encoded without quotes")


@pytest.mark.parametrize("name", WRAPPINGS)
def test_a_wrapped_plan_is_read_whole(name: str) -> None:
    wrapped = WRAPPINGS[name](PLAN)
    assert Blueprint.parse(wrapped) == PLAN
    answer = parse_answer(wrapped, instruction="Do something else.")
    assert (answer.blueprint, answer.alignment) == (PLAN, "unstated")


@pytest.mark.parametrize("name", WRAPPINGS)
def test_a_wrapped_plan_that_is_cut_off_is_refused(name: str) -> None:
    """Wherever it is cut: within it, or in what wraps it. What is read is the whole plan."""
    wrapped = WRAPPINGS[name](PLAN)
    # A draft is all there is in front of its end, and some forms do not show where a text ends.
    drafted = name in ("draft before", "after reasoning opened in the prompt")
    open_ended = name in OPEN_ENDED
    in_json = "{" in wrapped[:9] and not open_ended
    refused = 0
    for end in range(1, len(wrapped)):
        for tail in ("", "\n```", "</answer>") if in_json else ("",):
            try:
                found = Blueprint.parse(wrapped[:end] + tail)
            except BlueprintError:
                refused += 1
                continue
            if open_ended:
                assert PLAN.imagination.startswith(found.imagination.partition("<")[0].strip("|\n"))
                found = replace(found, imagination=PLAN.imagination)
            assert found == PLAN or (drafted and found == DRAFT)
    assert refused > 0.7 * len(PLAN.render())


def test_real_plans_are_read_in_every_wrapping(shared_real: Path) -> None:
    for plan in real_plans(shared_real, 20):
        for name, wrap in WRAPPINGS.items():
            if name == "quotes as they are":
                continue  # some have a single quotation mark, for inches
            assert Blueprint.parse(wrap(plan)) == plan, name


def test_real_plans_in_json_that_is_cut_off_are_refused(shared_real: Path) -> None:
    rng = random.Random(2)
    for plan in real_plans(shared_real, 60):
        for name in rng.sample(["many lines", "under a key", "encoded twice", "Python"], 2):
            wrapped = WRAPPINGS[name](plan)
            for end in rng.sample(range(1, len(wrapped.rstrip('"'))), 20):
                with pytest.raises(BlueprintError):
                    parse_answer(wrapped[:end], instruction="Do something.")


def real_plans(shared_real: Path, count: int) -> list[Blueprint]:
    """Plans of both real designers."""
    plans = []
    for name in ("imgedit_gpt4o", "imgedit_qwen2.5vl_3b"):
        lines = (shared_real / "blueprints" / f"{name}.jsonl").read_text().splitlines()
        chosen = random.Random(count).sample(lines, count)
        plans += [Blueprint.parse(json.loads(line)["blueprint"]) for line in chosen]
    return plans


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["a cup", "a plate"], "- a cup\n- a plate"),
        ([{"object": "cup", "colour": "red"}], "- object: cup; colour: red"),
        ({"cup": {"size": "S"}, "box": ["red"]}, "- cup:\n  - size: S\n- box:\n  - red"),
        ({"title": "Local Object Perception", "text": "a cup"}, "a cup"),
        ({"type": "string", "value": "a cup"}, "a cup"),
        ("3. Local Object Perception: a cup", "a cup"),
    ],
)  # fmt: skip
def test_a_section_that_is_no_plain_text_becomes_one(value: object, text: str) -> None:
    answer = {**fields(PLAN), KEYS[2]: value}
    assert Blueprint.parse(json.dumps(answer)).local_objects == text


def test_a_section_of_text_that_is_json_becomes_words() -> None:
    answer = PLAN.render().replace(PLAN.local_objects, '[{"object": "cup", "colour": "red"}]')
    assert Blueprint.parse(answer).local_objects == "- object: cup; colour: red"
    assert parse_answer(answer, instruction="x").words == Blueprint.parse(answer).render()


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ('Objects: {"box": [1, 2], "label": "cup"}', r"section 3 .* holds a field of JSON"),
        ('"A cup.",', "section 3 .* holds the end of a text"),
        ("A cup.\n}", "section 3 .* holds a bracket alone"),
        ("A cup and a \\neq.", "section 3 .* holds an escape"),
        ("<edit_instruction>x", "section 3 .* holds an element"),
    ],
)
def test_no_mark_of_json_stays_in_a_section(section: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        Blueprint.parse(PLAN.render().replace(PLAN.local_objects, section))


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (json.dumps({**fields(PLAN), KEYS[2]: None}), "section 3 .* is missing"),
        (json.dumps({**fields(PLAN), KEYS[2]: []}), "section 3 .* is empty"),
        (json.dumps({**fields(PLAN), KEYS[2]: True}), "section 3 .* is no text"),
        (json.dumps({**fields(PLAN), "Edit Area Localization": "x"}), "two texts for 'edit_area"),
        (json.dumps({key: {"type": "string"} for key in KEYS}), "section 1 .* is empty"),
        (json.dumps([fields(PLAN), fields(DRAFT)]), "several answers"),
        (json.dumps([PLAN.render(), DRAFT.render()]), "several texts"),
        (json.dumps({"thinking": fields(PLAN)}), "none of the five"),
        (f"{pretty(PLAN)}\nNo: {pretty(DRAFT)[:-9]}", "cut off or malformed"),
        (pretty(PLAN)[1:-1], "cut off or malformed"),
        (pretty(PLAN)[:-2], "cut off or malformed"),
        (f"<|channel|>analysis<|message|>{pretty(PLAN)}", "within its reasoning"),
    ],
)
def test_json_that_is_no_plan_says_what_is_wrong(answer: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        Blueprint.parse(answer)


@pytest.mark.parametrize(
    ("answer", "alignment"),
    [
        (json.dumps({"alignment": "aligned", **fields(PLAN)}), "aligned"),
        (json.dumps({"x": {"alignment": "Not aligned"}, "y": fields(PLAN)}), "misaligned"),
        (f"Alignment: aligned\n\n{pretty(PLAN)}", "aligned"),
        (f"The sign [SALE] is new.\nAlignment: misaligned\n\n{pretty(PLAN)}", "misaligned"),
        ('It differs: {"alignment": "misaligned", "instruction": "-"}', "misaligned"),
        (json.dumps({"answer": "Alignment: misaligned"}), "misaligned"),
    ],
)  # fmt: skip
def test_the_verdict_is_read_from_json_too(answer: str, alignment: str) -> None:
    read = parse_answer(answer, instruction="x")
    assert read.alignment == alignment
    assert read.blueprint == (None if alignment == "misaligned" else PLAN)


def test_verdicts_that_differ_are_none() -> None:
    with pytest.raises(BlueprintError, match="exactly one"):
        parse_answer(
            f'Alignment: misaligned\n{{"alignment": "aligned", {pretty(PLAN)[1:]}', instruction="x"
        )


@pytest.mark.parametrize("wrap", [Blueprint.render, pretty, lambda p: f"```json\n{pretty(p)}\n```"])
def test_where_reasoning_belongs_a_plan_that_stands_alone_is_read(wrap: Wrap) -> None:
    assert Blueprint.parse(as_reasoning(wrap(PLAN))) == PLAN
    assert parse_answer(
        as_reasoning(f"Alignment: aligned\n\n{PLAN.render()}"), instruction="x"
    ).words


@pytest.mark.parametrize(
    "thought",
    [
        f"Okay, let me see.\n\n{PLAN.render()}",
        f"Okay, let me see.\n\n{pretty(PLAN)}",
        f"{pretty(PLAN)}\n\nWait, is that right?",
        "Okay, let me see.",
    ],
)
def test_thoughts_about_a_plan_are_no_plan(thought: str) -> None:
    with pytest.raises(BlueprintError, match="reasoning alone: it is no plan"):
        Blueprint.parse(as_reasoning(thought))
    with pytest.raises(BlueprintError, match="reasoning alone: it is no plan"):
        parse_answer(as_reasoning(thought), instruction="Do something.")
