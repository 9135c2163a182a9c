"""A bundle is signed by who may release one."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from app import bundle_commands
from app.cli import main
from models import signatures
from models.bundle import Bundle, BundleError, load_bundle
from models.recalibration import change_prevalence, save_recalibrated
from models.signatures import SIGNATURE, SignatureError, sign
from tests.bundles import make_bundle


def write_keys(folder: Path, name: str, key: object = None) -> tuple[Path, Path]:
    key = key or Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle").folder


def test_a_signed_bundle_is_taken_and_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    private, public = write_keys(tmp_path, "release")
    _, other = write_keys(tmp_path, "other")
    with pytest.raises(
        BundleError, match=r"bundle cannot be trusted: there is no bundle.json.sig: sign with"
    ):
        load_bundle(folder, public)
    monkeypatch.setattr("sys.argv", ["mmtl", "bundle", "sign", str(folder), "--key", str(private)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert load_bundle(folder, public) == load_bundle(folder)
    with pytest.raises(BundleError, match=r"is not by .*other\.pub\.pem"):
        load_bundle(folder, other)
    monkeypatch.setenv("MMTL_BUNDLE_SIGNED_BY", str(other))  # of the commands, too
    new = str(tmp_path / "new")
    for told in (
        ["inspect", str(folder)],
        ["diff", str(folder), str(folder)],
        ["recalibrate", str(folder), "--prevalence", "0.2", "-o", new],
    ):
        monkeypatch.setattr("sys.argv", ["mmtl", "bundle", *told])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert "cannot be trusted" in capsys.readouterr().err
    assert not Path(new).exists()


def test_what_is_signed_is_what_was_verified(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    private, _ = write_keys(tmp_path, "release")

    def load_and_be_overtaken(folder: Path) -> Bundle:
        bundle = load_bundle(folder)
        manifest = folder / "bundle.json"
        manifest.write_text(manifest.read_text().replace("0.5", "0.9", 1))
        return bundle

    monkeypatch.setattr(bundle_commands, "load_bundle", load_and_be_overtaken)
    monkeypatch.setattr("sys.argv", ["mmtl", "bundle", "sign", str(folder), "--key", str(private)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "has changed while it was verified: it is not signed." in capsys.readouterr().err
    assert not (folder / SIGNATURE).exists()


def test_without_the_library_one_sentence_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path, "release")
    monkeypatch.setattr(signatures, "find_spec", lambda name: None)
    with pytest.raises(SignatureError, match="install the extra `signatures`"):
        sign(b"", private, folder / SIGNATURE)
    with pytest.raises(BundleError, match="install the extra `signatures`"):
        load_bundle(folder, public)


def test_the_signature_of_another_manifest_is_not_copied(folder: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path, "release")
    sign((folder / "bundle.json").read_bytes(), private, folder / SIGNATURE)
    (tmp_path / "secret").write_text("of the machine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    bundle = load_bundle(folder)
    changed = change_prevalence(bundle.manifest, 0.2)
    saved = save_recalibrated(bundle, tmp_path / "new", changed, "to 20 %")
    assert not (saved.folder / SIGNATURE).exists()
    assert not (saved.folder / "notes.txt").exists()  # what it leads to nobody gave away
    assert (saved.folder / "model.onnx").exists()


def test_a_changed_manifest_is_not_even_parsed(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "release")
    manifest = folder / "bundle.json"
    sign(manifest.read_bytes(), private, folder / SIGNATURE)
    manifest.write_text(manifest.read_text().replace("0.5", "0.9", 1) + "{")
    with pytest.raises(BundleError, match=r"is not by .*, or of another manifest"):
        load_bundle(folder, public)
    with pytest.raises(BundleError, match="does not fit"):
        load_bundle(folder)


def test_keys_that_are_none_are_named(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(SignatureError, match=r"curve\.pem is no Ed25519 key"):
        sign(b"", private, folder / SIGNATURE)
    with pytest.raises(BundleError, match=r"curve\.pub\.pem is no Ed25519 key"):
        load_bundle(folder, public)
    text = tmp_path / "text"
    text.write_text("no key")
    with pytest.raises(BundleError, match=r"text is no PEM file of a public key \(openssl .*\)\."):
        load_bundle(folder, text)
    with pytest.raises(
        BundleError, match=r"absent\.pem cannot be read: No such file or directory\."
    ):
        load_bundle(folder, tmp_path / "absent.pem")
