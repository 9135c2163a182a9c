from pathlib import Path

import pytest

from app import cli
from tests.lesions import flat


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, capsys):
    monkeypatch.setenv("MMTL_BUNDLE", str(bundle_folder))

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["mmtl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        return int(stopped.value.code or 0), output.out, output.err

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(flat(160))
    return path
