"""The pieces of the server that need no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from ray.serve.exceptions import BackPressureError

from dim.config import load_config
from dim.errors import CallsStopped, ConfigError, DesignerError, InputError, StorageError
from serving.admission import Admission
from serving.app import build, read_args
from serving.config import Rates, ServingConfig
from serving.errors import BadRequestError, BusyError, OpenAIErrorRoute, error_response
from serving.jobs import Defaults, in_groups, unwrap
from serving.protocol import EditFields, PaintRequest
from serving.rates import RateMeter
from serving.requests import Edit, read_edit
from serving.studio import seeds
from serving.work import Work, check_output, painted_size, work_of


@pytest.mark.parametrize("module", ["app", "designer", "rates", "contributions"])
def test_what_holds_no_model_does_without_the_models_libraries(module: str) -> None:
    # Their replicas would start seconds later, and take 400 MB each.
    code = (
        f"import sys, serving.{module}\n"
        "from dim.model.sizes import nearest_shape\n"
        "nearest_shape((300, 200), 1024, 32)\n"  # nor a request that asks for a shape
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_admission_counts_work_and_frees_its_places() -> None:
    admission = Admission(Work(10, 100, 1000))
    with admission.admit(Work(6, 1, 1)):
        with admission.admit(Work(4, 0.7, 0.1)):
            assert admission.pending.images == 10
            with pytest.raises(BusyError) as refused, admission.admit(Work(1, 1, 1)):
                pytest.fail("the eleventh image was let in")
            with pytest.raises(BusyError, match="10 images"):
                admission.refuse_when_full()
        assert admission.pending.images == 6
        admission.refuse_when_full()
    assert refused.value.retry_after_s > 0
    with pytest.raises(ValueError, match="broke"), admission.admit(Work(10, 1, 1)):
        raise ValueError("broke")
    assert admission.pending == Work()


@pytest.mark.parametrize(
    ("kind", "said"), [("megapixels", "megapixels"), ("megapixel_steps", "megapixel-steps")]
)
def test_what_is_let_in_is_bounded_by_what_it_costs(kind: str, said: str) -> None:
    admission = Admission(Work(10, 100, 100))
    with admission.admit(Work(1, **{kind: 60})):
        with admission.admit(Work(1, **{kind: 40})):
            pass
        with pytest.raises(BusyError, match=f"60 {said}"), admission.admit(Work(1, **{kind: 41})):
            pytest.fail("over the limit")
    with (
        pytest.raises(BadRequestError, match=f"101 {said}"),
        admission.admit(Work(1, **{kind: 101})),
    ):
        pytest.fail("over the limit alone")


def test_the_work_of_a_request_is_what_it_paints_and_holds() -> None:
    defaults = Defaults(
        resolution=1024,
        size_multiple=32,
        steps=30,
        guidance_scale=1,
        image_tokens=1,
        edits=True,
        release="a",
        model_hash="a",
    )
    wide = painted_size((6000, 3000), "source", defaults)
    assert abs(wide[0] * wide[1] / 1024**2 - 1) < 0.1 and wide[0] > 1.9 * wide[1]
    assert painted_size((6000, 3000), "square", defaults) == (1024, 1024)
    work = work_of(2, (6000, 3000), (1000, 500), (6000, 3000), 30)
    assert work == Work(images=2, megapixels=3 * 18.0, megapixel_steps=2 * 0.5 * 30)
    check_output(2, (5000, 5000), 50_000_000, "n")
    with pytest.raises(BadRequestError, match=r"3 of 5000x5000 are 75,000,000 pixels"):
        check_output(3, (5000, 5000), 50_000_000, "n")


def test_a_clients_rate_is_full_at_first_and_again_after_a_minute() -> None:
    meter = RateMeter()
    rates = Rates(requests_per_minute=60, images_per_minute=10)
    take = partial(meter.take_at, "shop", rates)
    assert take({"images": 8}, now=0).lacking is None
    short = take({"images": 4, "megapixel_steps": 1e9}, now=0)
    assert short.lacking == "images" and short.retry_after_s == pytest.approx(12)
    assert short.headers == {
        "x-ratelimit-limit-images": "10",
        "x-ratelimit-remaining-images": "2",
        "x-ratelimit-reset-images": "48.0s",
    }
    assert meter.take_at("nightly", rates, {"images": 10}, now=0).lacking is None
    assert take({"images": 4}, now=11).lacking == "images"
    assert take({"images": 4}, now=12.1).lacking is None
    assert take({"images": 10}, now=200).lacking is None
    assert take({"images": 10.5}, now=900).retry_after_s == float("inf")
    # All or nothing: what lacks one kind takes nothing of the others.
    assert take({"requests": 60, "images": 10}, now=1000).lacking is None
    assert take({"requests": 1, "images": 10}, now=1030).lacking == "images"
    assert take({"requests": 30, "images": 5}, now=1030).lacking is None


def test_groups_keep_the_order() -> None:
    seen: list[Sequence[int]] = []

    def work(group: Sequence[int]) -> list[int]:
        seen.append(list(group))
        return [number * 10 for number in group]

    assert in_groups([1, 2, 3, 4, 5], lambda number: number % 2, work) == [10, 20, 30, 40, 50]
    assert sorted(seen) == [[1, 3, 5], [2, 4]]


def test_a_failing_group_is_done_one_by_one() -> None:
    def work(group: Sequence[int]) -> list[int]:
        if 2 in group:
            raise InputError("two is bad")
        return list(group)

    results = in_groups([1, 2, 3], lambda _: None, work)
    assert (results[0], results[2]) == (1, 3)
    with pytest.raises(InputError, match="two is bad"):
        unwrap(results[1])
    assert unwrap(results[0]) == 1


def test_a_bug_in_a_batch_names_itself() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        unwrap(KeyError("x"))


def test_seeds_count_up_and_stay_in_range() -> None:
    assert seeds(PaintRequest(prompt="a", n=3, seed=7)) == [7, 8, 9]
    assert seeds(PaintRequest(prompt="a", n=2, seed=2**63 - 1)) == [2**63 - 1, 0]
    assert len(set(seeds(PaintRequest(prompt="a", n=3)))) == 3


READING = FastAPI()
READING.router.route_class = OpenAIErrorRoute
PIXEL = {"image_url": "data:image/png;base64,eA=="}


@READING.post("/")
async def read(edit: Annotated[Edit, Depends(read_edit)]) -> JSONResponse:
    """What was read of a request."""
    assert edit.image == b"x"
    return JSONResponse(edit.fields.model_dump(include=set(EditFields.model_fields)))


def sent_both_ways(**fields: object) -> tuple[dict, dict]:
    """What is read of a form whose texts are ``fields`` as JSON writes them, and of the JSON."""
    client = TestClient(READING)
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in fields.items()}
    form = client.post("/", data=texts, files={"image": ("a.png", b"x")})
    body = client.post("/", json={**fields, "images": [PIXEL]})
    return tuple(answer.json().get("error", answer.json()) for answer in (form, body))  # type: ignore[return-value]


GIVEN = {
    "n": {2: [2, 2.0, "2", "2.0", " 2 ", "2e0"]},
    "seed": {0: [0, "0"], 2**63 - 1: [2**63 - 1, str(2**63 - 1)]},
    "steps": {3: [3, "3"]},
    "guidance_scale": {2.5: [2.5, "2.5"], 3.0: [3, "3"]},
    "stream": {
        False: [False, 0, "false", "False", "FALSE", "0", "no", "off"],
        True: [True, 1, "true", "True", "1", "yes"],
    },
    "size": {"64x64": ["64x64"]},
    "designer": {"none": ["none"]},
    "blueprint": {" 1. Any text.\n": [" 1. Any text.\n"], "null and void": ["null and void"]},
    "response_format": {"b64_json": ["b64_json"]},
    "output_format": {"png": ["png"]},
    "prompt": {"null": ["null"], "0": ["0"], "false": ["false"], " x ": [" x "]},
}


@pytest.mark.parametrize(
    ("name", "sent", "meant"),
    [(name, sent, meant) for name, all_ in GIVEN.items() for meant in all_ for sent in all_[meant]],
)
def test_a_forms_texts_mean_what_jsons_values_mean(name: str, sent: object, meant: object) -> None:
    form, body = sent_both_ways(**{"prompt": "remove the cup", name: sent})
    assert form == body
    assert form[name] == meant and type(form[name]) is type(meant)


@pytest.mark.parametrize("nothing", ["", "null", " ", "undefined", None])
@pytest.mark.parametrize("name", [*(name for name in GIVEN if name != "prompt"), "mask"])
def test_an_optional_field_that_says_nothing_is_not_given(name: str, nothing: str | None) -> None:
    form, body = sent_both_ways(prompt="remove the cup", **{name: nothing})
    assert form == body == sent_both_ways(prompt="remove the cup")[0]


def test_none_is_nothing_but_where_it_may_be_a_designer() -> None:
    assert sent_both_ways(prompt="x", seed="None")[0] == sent_both_ways(prompt="x")[0]
    form, body = sent_both_ways(prompt="x", designer="None")
    assert form == body and form["designer"] == "None"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("partial_images", 4, "partial_images: input should be less than or equal to 3"),
        ("partial_images", 1, "partial_images: only a stream (stream=true) has them"),
        ("stream", "perhaps", "stream: input should be a valid boolean"),
        ("n", True, "n: input should be a number, not true or false"),
        ("n", 1.5, "n: input should be a valid integer"),
        ("n", "two", "n: input should be a valid integer"),
        ("n", 0, "n: input should be greater than"),
        ("n", "[" * 20_000, "n: input should be a valid integer"),
        ("seed", -1, "seed: input should be greater than"),
        ("guidance_scale", "NaN", "guidance_scale: input should be a finite number"),
        ("guidance_scale", False, "guidance_scale: input should be a number, not true"),
        ("response_format", "gif", "response_format: input should be 'b64_json' or 'url'"),
        ("output_format", "gif", "output_format: input should be 'png', 'jpeg' or 'webp'"),
        ("output_compression", 101, "output_compression: input should be less than or equal"),
        ("output_compression", 50, "output_compression: only jpeg and webp have it"),
        ("background", "transparent", "background: images are painted opaque"),
        ("input_fidelity", "low", "input_fidelity: input should be 'high'"),
        ("quality", "best", "quality: input should be 'auto', 'low', 'medium', 'high'"),
        ("num_inference_steps", 0, "num_inference_steps: input should be greater than"),
        (
            "negativ_prompt",
            "x",
            "negativ_prompt: no field 'negativ_prompt' is known here; did you "
            "mean 'negative_prompt'?",
        ),
        ("strength", 0.5, "strength: no field 'strength' is known here"),
        ("rounds", 5, "rounds: input should be less than or equal to 4"),
        ("best_of", 0, "best_of: input should be greater than or equal to 1"),
        ("prompt", "", "prompt: field required"),
        ("prompt", " ", "prompt: value error, the prompt is blank"),
    ],
)
def test_what_is_wrong_is_said_alike_of_form_and_json(name: str, value: object, said: str) -> None:
    form, body = sent_both_ways(**{"prompt": "remove the cup", name: value})
    assert form == body
    assert form["param"] == name and form["message"].startswith(said)


def test_fields_that_contradict_each_other_are_refused() -> None:
    form, body = sent_both_ways(prompt="x", steps=3, num_inference_steps=4)
    assert form == body and form["param"] == "steps" and "num_inference_steps" in form["message"]
    form, body = sent_both_ways(prompt="x", steps=3, quality="low")
    assert form == body and form["param"] == "quality"
    assert sent_both_ways(prompt="x", num_inference_steps="3")[0]["steps"] == 3


def test_a_file_that_is_not_chosen_is_not_given() -> None:
    files = {"image[]": ("a.png", b"x"), "mask": ("", b""), "seed": ("", b"")}
    answer = TestClient(READING).post("/", data={"prompt": "x", "image": ""}, files=files)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("data", "files", "param", "said"),
    [
        ({}, {}, "image", "got no image"),
        ({"image": "x"}, {}, "image", "must be a file part, not text"),
        ({"mask": "x"}, {"image": b"x"}, "mask", "must be a file part, not text"),
        ({"seed": ["1", "2"]}, {"image": b"x"}, "seed", "seed is given 2 times"),
        ({}, {"image": b"x", "image[]": b"x"}, "image", "got 2 images"),
    ],
)
def test_a_form_with_the_wrong_parts_is_refused(
    data: dict, files: dict, param: str, said: str
) -> None:
    parts = {name: ("a.png", content) for name, content in files.items()}
    answer = TestClient(READING).post(
        "/", data={"prompt": "x", **data}, files=parts or {"other": ("a", b"x")}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]


@pytest.mark.parametrize(
    ("images", "param", "said"),
    [
        ([], "image", "got no image"),
        ([PIXEL, PIXEL], "image", "got 2 images"),
        ([{"image_url": "http://10.0.0.1/a.png"}], "images[0].image_url", "fetches nothing"),
        ([{"image_url": "file:///etc/passwd"}], "images[0].image_url", "fetches nothing"),
        ([{"image_url": "data:image/png,x"}], "images[0].image_url", "without base64"),
        ([{"image_url": "data:image/png;base64,é"}], "images[0].image_url", "not valid base64"),
        ([{"file_id": "file-1"}], "images[0].file_id", "no files are kept here"),
        ([{"image_url": 3}], "images[0].image_url", "valid string"),
        ("x", "images", "valid tuple"),
    ],
)
def test_json_brings_its_picture_along_or_is_refused(images: object, param: str, said: str) -> None:
    answer = TestClient(READING).post("/", json={"prompt": "x", "images": images})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]


def test_a_body_that_is_neither_form_nor_json_is_refused() -> None:
    answer = TestClient(READING).post("/", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]


class WrappedByRay(Exception):
    """The shape of a remote task's error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last): …")
        self.cause = cause

    def as_instanceof_cause(self) -> Exception:
        return self


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (DesignerError("the designer timed out"), 502, ("x-should-retry", "false")),
        (WrappedByRay(DesignerError("the designer timed out")), 502, None),
        (CallsStopped("the designer is down"), 502, ("x-should-retry", "false")),
        (ExceptionGroup("many", [WrappedByRay(InputError("a bad image"))]), 400, None),
        (BackPressureError(3, 3), 429, ("retry-after", "2")),
        (TimeoutError(), 504, None),
        (KeyError("a bug"), 500, None),
        (StorageError("s3://bucket is away"), 503, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_its_status_and_no_traceback(
    error: Exception, status: int, header: tuple[str, str] | None
) -> None:
    response = error_response(error)
    assert response.status_code == status
    assert b"Traceback" not in response.body and b"a bug" not in response.body
    if header is not None:
        assert response.headers[header[0]] == header[1]


def test_configuration_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"max_batchsize.*did you mean 'max_batch_size'"):
        load_config(ServingConfig, None, ["model=m", "max_batchsize=3"])
    with pytest.raises(ConfigError, match="at least one designer"):
        read_args({"model": "m", "designers": []})
    with pytest.raises(ConfigError, match="missing key 'model'"):
        build({})


def test_a_model_is_called_after_its_folder() -> None:
    assert ServingConfig(model="runs/edit2/model").model_name == "edit2"
    assert ServingConfig(model="runs/tiny").model_name == "tiny"
