"""What README.md says of the shipped bundle is so."""

import re

from models.bundle import MANIFEST, load_bundle, sha256_of
from tests.conftest import ROOT


def test_the_answer_that_the_readme_shows_is_the_shipped_network_s() -> None:
    text = (ROOT / "README.md").read_text()
    bundle = load_bundle(ROOT / "models/default")
    shown = dict(
        re.findall(r'"(sha256|manifest_sha256)": "([0-9a-f]{64})"', text.split("results")[0])
    )
    assert shown["sha256"] in {artifact.sha256 for artifact in bundle.manifest.artifacts}
    assert shown["manifest_sha256"] == sha256_of(bundle.folder / MANIFEST)
    assert f'"name": "{bundle.manifest.name}", "version": "{bundle.manifest.version}"' in text
