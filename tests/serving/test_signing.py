"""C2PA: signed images hold, changed ones do not, and a wrong certificate is said at the start."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from dim import provenance
from dim.errors import ConfigError
from dim.images import decode_image, encode_png
from serving.config import ServingConfig, SigningConfig
from serving.encoding import Output, encode
from serving.jobs import EditJob, GenerateJob, Painted
from serving.painter import PainterDeployment
from serving.serve import check
from serving.signing import LABEL, Sign, open_signer

SAID = (("model", "edit2"), ("seed", "7"))


def certificate(folder: Path) -> SigningConfig:
    """A chain of two, as C2PA wants them: the signer's own and that of who issued it."""
    now = datetime.datetime.now(datetime.UTC)

    def named(name: str) -> x509.Name:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
             x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )  # fmt: skip

    def made(subject: str, key: Any, issuer_key: Any, *, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("Issuer"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=10))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, authority,
                              False, False), critical=True,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )  # fmt: skip
        if not authority:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(usage, critical=True)
        return builder.sign(issuer_key, hashes.SHA256())

    root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain = made("Server", own, root, authority=False), made("Issuer", root, root, authority=True)
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(each.public_bytes(pem) for each in chain))
    private = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(own.private_bytes(pem, private, serialization.NoEncryption()))
    return SigningConfig(certificate=str(folder / "chain.pem"), key=str(folder / "key.pem"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SigningConfig:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def sign(config: SigningConfig) -> Sign:
    found = open_signer(config)
    assert found is not None
    return found


def read(data: bytes, format: str) -> tuple[dict[str, Any], str]:
    """The manifest of an image, and every failure of its validation but that nobody is trusted."""
    import c2pa

    with c2pa.Reader(f"image/{format}", io.BytesIO(data)) as reader:
        said = json.loads(reader.json())
    codes = [each["code"] for each in said.get("validation_status", [])]
    wrong = [code for code in codes if code != "signingCredential.untrusted"]
    return said["manifests"][said["active_manifest"]], " ".join(wrong)


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("edited", [True, False])
def test_a_signed_image_holds(format: Any, edited: bool, sign: Sign) -> None:
    output = Output(format, metadata=SAID)
    plain = encode(picture(), output)
    signed = sign(plain, output, edited)
    manifest, wrong = read(signed, format)
    assert not wrong
    (said,) = [each["data"] for each in manifest["assertions"] if each["label"] == LABEL]
    assert said == dict(SAID) == provenance.read(signed)
    (action,) = next(
        each["data"]["actions"] for each in manifest["assertions"]
        if each["label"].startswith("c2pa.actions")
    )  # fmt: skip
    kind = "compositeWithTrainedAlgorithmicMedia" if edited else "trainedAlgorithmicMedia"
    assert action["digitalSourceType"].endswith(f"/{kind}")
    assert decode_image(signed).tobytes() == decode_image(plain).tobytes()


def test_a_changed_image_does_not_hold(sign: Sign) -> None:
    output = Output(metadata=SAID)
    signed = sign(encode(picture(), output), output, True)
    changed = signed.replace(b'"seed": "7"', b'"seed": "8"', 1)
    assert changed != signed
    assert "mismatch" in read(changed, "png")[1].lower()


def test_the_painter_signs_what_it_hands_over_and_no_preview(
    config: SigningConfig, tiny_model_dir: Path
) -> None:
    painter = PainterDeployment(ServingConfig(model=str(tiny_model_dir), signing=config))
    common: dict[str, Any] = {"seed": 1, "steps": 2, "guidance_scale": 1.0, "previews": 1}
    edit = EditJob(image=encode_png(picture()), text="x", fit="source", **common)
    generation = GenerateJob(prompt="x", size=(64, 64), **common)

    async def paint(job: Any) -> list[Any]:
        return [piece async for piece in painter.paint(job)]

    for job, kind in ((edit, "compositeWith"), (generation, "/trainedAlgorithmicMedia")):
        preview, painted = asyncio.run(paint(job))
        assert isinstance(painted, Painted) and b"c2pa" not in preview.data
        manifest, wrong = read(painted.data, "png")
        assert not wrong and kind in json.dumps(manifest)


def test_a_wrong_certificate_is_said_before_ray_starts(
    config: SigningConfig, tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "other.pem").write_text("no key")
    secret = Path(config.key).read_text().splitlines()[1]
    for update, said in (
        ({"key": str(tmp_path / "other.pem")}, "are no certificate chain and key for C2PA's es256"),
        ({"certificate": config.key}, "are no certificate chain and key"),
        ({"algorithm": "ed25519"}, "are no certificate chain and key for C2PA's ed25519"),
        ({"certificate": str(tmp_path / "none.pem")}, "cannot read .*none.pem: No such file"),
    ):
        wrong = config.model_copy(update=update)
        with pytest.raises(ConfigError, match=said) as raised:
            check(ServingConfig(model=str(tiny_model_dir), signing=wrong), with_port=False)
        assert secret not in str(raised.value)


def test_without_the_package_it_is_asked_for() -> None:
    config = SigningConfig(certificate="a.pem", key="b.pem")
    with (
        mock.patch.dict("sys.modules", {"c2pa": None}),
        pytest.raises(ConfigError, match="signing needs the package c2pa-python"),
    ):
        open_signer(config)
    assert open_signer(None) is None
