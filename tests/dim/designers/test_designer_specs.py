from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dim import designers
from dim.designers.openai import OpenAIModel
from dim.errors import DesignerError


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("gpt-4o", "unknown designer 'gpt-4o'; there are openai:MODEL@URL, replay:PATH, oracle"),
        ("", "unknown designer"),
        ("Oracle", "unknown designer"),
        ("openai", "incomplete designer"),
        ("openai:", "incomplete designer"),
        ("replay:", "incomplete designer 'replay:'; write replay:PATH"),
        ("oracle:x", "incomplete designer"),
        ("noisy", "incomplete designer 'noisy'; write noisy:SHARE"),
        ("noisy:2", "'noisy:2' is not of the form noisy:SHARE, with a share from 0 to 1"),
        ("noisy:nan", "is not of the form noisy:SHARE"),
        ("noisy:some", "is not of the form noisy:SHARE"),
        ("self:", "incomplete designer"),
        ("openai:m@localhost:8000/v1", "not of the form openai:MODEL@http"),
        ("openai:a b@http://x/v1", "not of the form"),
        ("replay:nowhere.jsonl", "recorded answers not found: nowhere.jsonl"),
        ("self:nowhere", "model folder not found: nowhere"),
    ],
)
def test_a_wrong_spec_is_one_clear_sentence(spec: str, complaint: str) -> None:
    with pytest.raises(DesignerError, match=complaint):
        designers.check(spec)


@pytest.mark.parametrize("spec", ["gpt-4o", "openai:m@localhost:8000/v1", "replay:nowhere.jsonl"])
def test_create_refuses_what_check_refuses(spec: str) -> None:
    with pytest.raises(DesignerError):
        designers.create(spec)


def test_model_names_may_hold_slashes_colons_and_at_signs() -> None:
    spec = "openai:org/model@v1:tag@http://127.0.0.1:9/v1"
    designers.check(spec)
    designer = designers.create(spec)
    assert isinstance(designer, OpenAIModel)
    assert designer.name == "openai:org/model@v1:tag"
    assert designer.costly


def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(DesignerError, match="needs OPENAI_API_KEY"):
        designers.create("openai:gpt-4o")


def test_captioners_have_their_own_list(tmp_path: Path) -> None:
    with pytest.raises(DesignerError, match="unknown captioner 'self'"):
        designers.check("self", captioner=True)
    designers.check("oracle", captioner=True)
    assert not designers.create_captioner("oracle").costly


def test_a_model_for_whole_data_sets_answers_no_single_request() -> None:
    designers.check("vllm:Qwen/Qwen2.5-VL-7B-Instruct")
    designers.check("vllm:Qwen/Qwen2.5-VL-7B-Instruct", captioner=True)
    assert designers.engine_model("vllm:org/m") == "org/m"
    assert designers.engine_model("openai:m@http://x/v1") is None
    for create in (designers.create, designers.create_captioner):
        with pytest.raises(DesignerError, match="in data jobs; .*vllm serve org/m"):
            create("vllm:org/m")


def test_naming_a_designer_loads_no_model() -> None:
    code = (
        "import sys\n"
        "from dim import designers\n"
        "designers.check('self'), designers.create('oracle')\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'ray', 'aiohttp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_file_of_answers_is_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert designers.from_anywhere("replay:mine/a.jsonl") == f"replay:{tmp_path}/mine/a.jsonl"
    for spec in ("replay:/mine/a.jsonl", "oracle", "openai:m@http://host/v1"):
        assert designers.from_anywhere(spec) == spec
