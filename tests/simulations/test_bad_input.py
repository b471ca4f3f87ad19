"""What a user gets wrong: one clear line, exit code 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedge_simulations.cli import main


@pytest.fixture
def data(tmp_path: Path):
    """Write arrays to data.npz; images of 8x8 with 10 classes unless told otherwise."""

    def write(**arrays):
        rng = np.random.default_rng(0)
        whole = {"x": rng.integers(0, 255, (200, 8, 8), dtype=np.uint8), "y": np.arange(200) % 10, **arrays}
        path = tmp_path / "data.npz"
        np.savez(path, **{name: value for name, value in whole.items() if value is not None})
        return path

    return write


def refused(capsys, tmp_path: Path, toml: str, *options: str) -> str:
    """Run the configuration and return its one line; checks exit code, line and that nothing was made."""
    config, out = tmp_path / "config.toml", tmp_path / "out"
    config.write_text(toml)
    assert main(["run", str(config), "--out", str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not out.exists()
    return captured.err.removeprefix("fedge-sim: error: ").strip()


IMAGES = 'task = "images"\ndata = "data.npz"\n[model]\nname = "mlp"\n'


def test_a_missing_file(capsys, tmp_path):
    assert "does not exist" in refused(capsys, tmp_path, 'task = "images"\ndata = "nowhere.npz"')


def test_no_file_at_all(capsys, tmp_path):
    assert "needs a file or folder of yours" in refused(capsys, tmp_path, 'task = "images"')


def test_wrong_array_names(capsys, tmp_path, data):
    data(x=None, pictures=np.zeros((3, 8, 8), np.uint8))
    line = refused(capsys, tmp_path, IMAGES)
    assert "holds ['pictures', 'y']; it must hold x and y" in line


def test_wrong_lengths(capsys, tmp_path, data):
    data(y=np.arange(199) % 10)
    assert "lengths differ: x 200, y 199" in refused(capsys, tmp_path, IMAGES)


@pytest.mark.parametrize(
    ("label", "says"), [(-1, "label -1 is out of range"), (10**6, "label 1000000 is out of range")]
)
def test_labels_out_of_range(capsys, tmp_path, data, label, says):
    y = np.arange(200) % 10
    y[7] = label
    data(y=y)
    assert says in refused(capsys, tmp_path, IMAGES)


def test_nan_in_images(capsys, tmp_path, data):
    x = np.zeros((200, 8, 8), np.float32)
    x[3, 2, 1] = np.nan
    data(x=x)
    assert "x[3, 2, 1] is nan; an image may hold" in refused(capsys, tmp_path, IMAGES)


def test_a_client_without_data(capsys, tmp_path, data):
    data(client=np.repeat(["a", "b"], 100), split=np.repeat(["train", "test"], 100))
    line = refused(capsys, tmp_path, IMAGES + '[clients]\npartition = "natural"')
    assert "client 'b' has no training example" in line


def test_more_clients_than_samples(capsys, tmp_path, data):
    data()
    assert "more clients than" in refused(capsys, tmp_path, IMAGES + "[clients]\ncount = 1000")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('tsk = "digits"', "unknown key 'tsk': did you mean 'task'?"),
        ('task = "digit"', "did you mean 'digits'?"),
        ("[rounds]\ncuont = 3", "unknown key 'rounds.cuont': did you mean 'count'?"),
        ("[rounds]\ncount = -3", "rounds.count = -3"),
        ('[model]\nname = "mpl"', "did you mean 'mlp'?"),
        ('[strategy]\nname = "fedagv"', "did you mean 'fedavg'?"),
        ('[strategy]\nname = "fedavgm"\nserver_momentun = 0.9', "did you mean 'server_momentum'?"),
        ('[strategy]\nname = "fedavgm"\nserver_momentum = "much"', "strategy.server_momentum = 'much'"),
        ('[strategy]\nname = "dp-server-fixed"', "privacy.mechanism = 'central' with privacy.clip_norm"),
        ('[train]\noptimizer = "adma"', "did you mean 'adam'?"),
        ('[model]\nname = "logistic"\nfilter = "clip"', "image inputs take one of none, median, gaussian"),
        ("[rounds]\ncount = ", "not valid TOML"),
        ('data = "mine.npz"', "mine.npz does not exist"),
        ("[evaluate]\nleave_one_client_out = true", "needs clients.partition = 'natural'"),
        ("[tiers.micro]\nmax_wire_byte = 3", "did you mean 'max_wire_bytes'?"),
        ('[rounds]\ntarget = "auc>=0.9"', "auc is not measured in this run"),
        ('task = "nosuch:TASK"', "cannot be loaded"),
    ],
)
def test_an_unknown_key_or_value(capsys, tmp_path, toml, says):
    assert says in refused(capsys, tmp_path, toml)


def test_an_override_without_a_value(capsys, tmp_path):
    assert "write it as key=value" in refused(capsys, tmp_path, "", "--set", "rounds.count")


@pytest.mark.slow
def test_a_tier_that_no_variant_can_meet(capsys, tmp_path):
    line = refused(
        capsys,
        tmp_path,
        "[evaluate]\nholdout_fraction = 0.4\n[tiers.dust]\nmax_wire_bytes = 100\nmax_drop = 0.05",
    )
    assert "dust" in line
    assert "max_wire_bytes" in line


def test_a_gate_too_small_to_prove_the_allowed_drop(capsys, tmp_path):
    line = refused(capsys, tmp_path, "[tiers.micro]\nmax_drop = 0.001")
    assert "micro" in line
    assert "max_drop" in line


def test_a_folder_that_holds_something_else(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    config = tmp_path / "config.toml"
    config.write_text("")
    assert main(["run", str(config), "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "holds no run of fedge" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
