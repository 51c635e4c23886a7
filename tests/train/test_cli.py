"""The `deftx` command: what it prints, its exit codes, and that errors are one line without a traceback."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from train_tiny import sentence, write_csv

from deftx_kernels import CSRMask, SparseDelta, cli, doctor, interop
from deftx_kernels.train import presets
from deftx_kernels.train.data_config import NusaxData

SHARED = Path(__file__).parents[3] / "shared/fixtures"


@pytest.fixture
def vectors(tmp_path) -> list[str]:
    """Two vectors of one base, saved."""
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(6, 5), "b.bias": torch.randn(4)}
    folders = []
    for number in range(2):
        tuned = {name: tensor.clone() for name, tensor in base.items()}
        tuned["a.weight"][number, :2] += 1.0
        delta = SparseDelta.from_models(tuned, base)
        delta.metadata["method"] = "lt-sft"
        delta.save_pretrained(tmp_path / f"vector{number}")
        folders.append(str(tmp_path / f"vector{number}"))
    return folders


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:  # tyro's own errors
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_shows_method_size_and_density(vectors, capsys):
    code, out, _ = run("inspect", vectors[0], capsys=capsys)
    assert code == 0
    assert "2 of 30 entries (6.667%)" in out
    assert '"lt-sft"' in out
    assert "a.weight" in out
    assert "6×5" in out


def test_inspect_a_mask_file(tmp_path, capsys):
    CSRMask.from_dense({"w": torch.eye(4, dtype=torch.bool)}).save(tmp_path / "mask.safetensors")
    code, out, _ = run("inspect", str(tmp_path / "mask.safetensors"), capsys=capsys)
    assert code == 0
    assert "CSRMask: 4 of 16 entries" in out


def test_compose_adds_vectors(vectors, tmp_path, capsys):
    code, out, _ = run("compose", *vectors, "-o", str(tmp_path / "sum"), capsys=capsys)
    assert code == 0
    assert out.strip() == str(tmp_path / "sum")
    total = SparseDelta.from_pretrained(tmp_path / "sum")
    parts = [SparseDelta.from_pretrained(path) for path in vectors]
    assert total.mask == parts[0].mask | parts[1].mask
    assert torch.equal(total.values.sort().values, torch.cat([part.values for part in parts]).sort().values)


def test_convert_there_and_back(vectors, tmp_path, capsys, monkeypatch):
    assert run("convert", vectors[0], str(tmp_path / "sft"), "--to", "composable-sft", capsys=capsys)[0] == 0
    assert (tmp_path / "sft/pytorch_diff.bin").is_file()
    assert run("convert", str(tmp_path / "sft"), str(tmp_path / "back"), capsys=capsys)[0] == 0
    first, back = (SparseDelta.from_pretrained(path) for path in (vectors[0], tmp_path / "back"))
    assert torch.equal(first.values, back.values)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name.split("/")[1]))
    assert run("convert", "me/sft", str(tmp_path / "downloaded"), capsys=capsys)[0] == 0
    assert torch.equal(SparseDelta.from_pretrained(tmp_path / "downloaded").values, first.values)


@pytest.fixture
def adapters(tmp_path) -> Path:
    """Folders base, shira, supertuning, lora and ia3: a base of one layer, and adapters of it."""
    weight, key = torch.randn(6, 5), "base_model.model.fc."
    one = torch.ones(11)
    folders: dict[str, tuple[dict, dict]] = {
        "shira": ({"r": 1}, {"shira_indices": torch.stack([torch.arange(11) // 5, torch.arange(11) % 5]).int()}),
        "supertuning": ({"sparsity": 0.75, "select_top": True}, {"supertuning_values": one[:7]}),
        "lora": ({"r": 2, "lora_alpha": 4}, {"lora_A.weight": torch.randn(2, 5), "lora_B.weight": torch.randn(6, 2)}),
        "ia3": ({}, {}),
    }
    folders["shira"][1]["shira_weight"] = one
    for name, (config, tensors) in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": name.upper(), **config}))
        save_file({key + n: t for n, t in tensors.items()}, tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "base").mkdir()
    save_file({"fc.weight": weight}, tmp_path / "base/model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "entries", "message"),
    [
        ("shira", [], 11, "not square: give base="),
        ("supertuning", [], 7, "give base, the folder of its base model"),
        ("lora", ["--density", "0.5"], 15, "give density or k"),
        ("lora", ["--k", "7"], 7, "give density or k"),
    ],
)
def test_convert_peft_adapters_and_back_to_shira(adapters, name, options, entries, message, capsys):
    source, out, back, base = (str(adapters / n) for n in (name, "out", "back", "base"))
    code, _, err = run("convert", source, out, capsys=capsys)
    assert code == 2
    assert message in err
    assert "is a PEFT adapter of type IA3" in run("convert", str(adapters / "ia3"), out, capsys=capsys)[2]
    assert run("convert", source, out, "--base", base, *options, capsys=capsys)[0] == 0
    delta = SparseDelta.from_pretrained(out)
    assert delta.mask.nnz == entries
    assert run("convert", out, back, "--to", "peft-shira", "--base", base, capsys=capsys)[0] == 0
    again = interop.from_peft_shira(back, {"fc.weight": torch.zeros(6, 5)})
    assert again.mask == delta.mask
    assert torch.equal(again.values, delta.values)
    assert run("inspect", source, "--base", base, *(["--density", "0.5"] if options else []), capsys=capsys)[0] == 0


def test_an_output_that_would_replace_its_source_and_other_formats(vectors, tmp_path, capsys):
    first, sft, out = vectors[0], str(tmp_path / "sft"), str(tmp_path / "out")

    def check_error(message: str, *arguments: str) -> None:
        code, _, err = run(*arguments, capsys=capsys)
        assert code == 2
        assert message in err

    for source in (first, f"{first}/sparse_delta.safetensors"):
        check_error("which it would replace", "convert", source, f"{first}/../vector0", "--dtype", "bfloat16")
    check_error("which it would replace", "compose", *vectors, "-o", first)
    to_sft = ("convert", first, sft, "--to", "composable-sft")
    check_error("dtype must be float32 for composable-sft, not bfloat16", *to_sft, "--dtype=bfloat16")
    check_error("density and k are for a LoRA adapter", "convert", first, out, "--k", "5")
    (tmp_path / "none").mkdir()
    check_error("none is no delta of a known format: it holds none of", "convert", str(tmp_path / "none"), out)
    assert run(*to_sft, capsys=capsys)[0] == 0
    check_error(f"is of composable-sft: run `deftx convert {sft} FOLDER` first", "compose", first, sft, "-o", out)
    assert not Path(out).exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no fixtures beside the repository")
@pytest.mark.parametrize("name", ["composable_sft", "peft_shira"])
def test_inspect_other_libraries_files(name, capsys):
    code, out, err = run("inspect", str(SHARED / name), capsys=capsys)
    assert code == 0 if "SparseDelta" in out else "base=" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "no/such/folder"], "no/such/folder"),
        (["compose", "no/such/folder", "-o", "out"], "no/such/folder"),
        (["run", "nusax", "--data-dir", "no/such/folder"], "data_dir no/such/folder: no such folder"),
        (["run", "demo", "--targets", "su", "--run-dir", "RUN"], "language 'su': CLDR has only"),
        (["run", "demo", "--model", "no/such/model", "--run-dir", "RUN"], "model 'no/such/model'"),
        (["train-task", "--train", "no.csv", "--run-dir", "RUN"], "no.csv: no such file"),
        (["train-language", "--text", "no.txt", "--language", "xx", "--run-dir", "RUN"], "no.txt: no such file"),
        (["eval", "--test", "no.csv", "--vectors", "no/such/vector"], "delta 'no/such/vector'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert not out
    assert err.startswith("deftx: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "bogus"),
        (["run", "nusax"], "--data-dir"),
        (["run", "demo", "--task.selection.density", "2"], "density must be above 0 and at most 1, not 2.0"),
        (["run", "demo", "--recipes", "bogus"], "bogus"),
        (["run", "demo", "--language.dense.lr", "0"], "lr must be a finite number above 0"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert "Traceback" not in out + err
    assert message in " ".join((out + err).replace("│", " ").split())


@pytest.mark.parametrize("options", [[], pytest.param(["-OO"], marks=pytest.mark.slow)])  # which compiles all of torch
def test_help_into_a_closed_pipe(options):
    """`python -OO -m deftx_kernels.cli --help | head`: neither a traceback nor a message."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, *options, "-m", "deftx_kernels.cli", "--help"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert done.returncode == 141
    assert not done.stderr


def test_what_the_disk_refuses_is_one_line(vectors, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    code, _, err = run("compose", *vectors, "-o", str(tmp_path / "file/out"), capsys=capsys)
    assert code == 2
    assert err.startswith("deftx: ")
    assert str(tmp_path / "file") in err
    assert err.count("\n") == 1
    monkeypatch.setitem(cli._HANDLERS, cli.Compose, lambda _: {}["a fault of ours"])
    with pytest.raises(KeyError, match="a fault of ours"):  # keeps its traceback
        cli.main(["compose", *vectors, "-o", "out"])


def test_every_command_has_help(capsys):
    for command in ("run", "train-language", "train-task", "compose", "eval", "inspect", "convert", "doctor"):
        code, out, _ = run(command, "--help", capsys=capsys)
        assert code == 0
        assert f"deftx {command}" in out


@pytest.mark.parametrize("wrong", [False, True])
def test_doctor_says_what_is_wrong_and_exits_with_1(wrong, capsys, monkeypatch):
    if wrong:
        right = doctor.reference.csr_gather
        monkeypatch.setattr(doctor.reference, "csr_gather", lambda *a: right(*a) + 1)
    asked = []
    monkeypatch.setattr(
        doctor, "run", lambda device, run=doctor.run: asked.append(device) or run(device, repeats=1, width=64)
    )
    code, out, _ = run("doctor", "--device", "cpu", capsys=capsys)
    assert code == (1 if wrong else 0)
    assert ("WRONG" in out) == wrong
    assert asked == ["cpu"]
    assert re.search(
        rf"^threads +{torch.get_num_threads()} \((torch default|OMP_NUM_THREADS=\d+)\)$", out, re.MULTILINE
    )
    assert "256×64" in out  # the shape, and beside it the time
    assert re.search(r"\d ms", out)


def test_inspect_needs_the_core_alone_and_training_names_the_extra(vectors):
    """A fresh interpreter in which the packages of the extra cannot be imported."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {cli.TRAIN_PACKAGES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from deftx_kernels import cli
print(cli.main(["inspect", {vectors[0]!r}]))
print(cli.main(["run", "demo"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    codes = [line for line in done.stdout.splitlines() if line in ("0", "2")]
    assert codes == ["0", "2"]
    assert done.stderr.strip().endswith('pip install "deftx-kernels[train]"')
    assert "Traceback" not in done.stderr


def test_train_task_language_and_eval(tmp_path, capsys, tiny_bert):
    train = write_csv(tmp_path / "train.csv", [(i, *sentence(i)) for i in range(32)])
    test = write_csv(tmp_path / "test.csv", [(i, *sentence(i)) for i in range(100, 116)])
    (tmp_path / "text.txt").write_text("\n".join(sentence(i)[0] for i in range(200, 232)) + "\n")
    phases = [
        option
        for phase in ("dense", "sparse")
        for option in f"--{phase}.max-steps 3 --{phase}.lr 0.01 --{phase}.no-keep-best".split()
    ]
    shared = ["--model", tiny_bert, *["--device", "cpu", "--batch-size", "8", "--max-length", "24"], *phases]
    language = ["train-language", "--text", str(tmp_path / "text.txt"), "--language", "xx"]
    language += ["--run-dir", str(tmp_path / "language"), "--head-steps", "2"]
    code, out, err = run(*language, *shared, capsys=capsys)
    assert code == 0, err
    phi_language = out.strip().splitlines()[-1]
    task = ["train-task", "--train", str(train), "--run-dir", str(tmp_path / "task")]
    code, out, err = run(*task, *shared, "--start-from", phi_language, capsys=capsys)
    assert code == 0, err
    phi_task = out.strip().splitlines()[-1]
    evaluate = ["eval", "--test", str(test), "--device", "cpu", "--vectors"]
    code, out, err = run(*evaluate, phi_task, phi_language, capsys=capsys)
    assert code == 0, err
    scores = json.loads(out.splitlines()[-1])
    assert scores["n"] == 16
    code, _, err = run("compose", phi_task, phi_language, "-o", str(tmp_path / "sum"), capsys=capsys)
    assert code == 0, err
    code, out, err = run(*evaluate, str(tmp_path / "sum"), capsys=capsys)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == scores
    code, _, err = run(*evaluate, phi_language, capsys=capsys)
    assert code == 2
    assert "exactly one task vector" in err
    code, _, err = run(*task, *shared, "--start-from", phi_language, "--seed", "1", capsys=capsys)
    assert code == 2
    assert "seed: 0 → 1" in err


@pytest.fixture
def parsed(monkeypatch) -> list:
    """The settings of the runs that are started, none of which runs."""
    found: list = []
    monkeypatch.setitem(cli._HANDLERS, cli.Run, lambda command: found.append(command.preset) or 0)
    return found


def test_profiles_of_a_preset(parsed, capsys):
    def config(*options: str):
        code, _, err = run("run", *options, capsys=capsys)
        assert code == 0, err
        return parsed.pop()

    nusax = ("nusax", "--data-dir", "folder")
    paper, small = config(*nusax), config(*nusax, "--profile", "small")
    assert config(*nusax, "--profile=small") == config(*nusax, "--profile", "paper", "--profile", "small") == small
    assert config(*nusax, "--profile=small", "--profile", "paper") == paper
    assert (paper.profile, small.profile) == ("paper", "small")
    assert paper == presets.NusaxRun(NusaxData(Path("folder")))
    assert small == presets.small(presets.NusaxRun, NusaxData(Path("folder")))
    assert (paper.task.dense.lr, paper.language.dense.epochs, paper.language.max_length) == (2e-5, 100, 256)
    assert small.task != paper.task
    assert small.language != paper.language

    options = ("--task.dense.lr", "0.003", "--language.selection.density", "0.5", "--sources", "a", "b", "--model", "m")
    for profile, defaults in (("paper", paper), ("small", small)):
        found = config(*nusax, *options, "--profile", profile)
        expected = copy.deepcopy(defaults)
        expected.task.dense.lr, expected.language.selection.density = 0.003, 0.5
        expected.data.sources, expected.model = ["a", "b"], "m"
        assert found == expected
    changed = config(*nusax, "--profile", "small", "--task.selection.rank", "4")
    assert (changed.task.selection.rank, changed.task.selection.energy) == (4, None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("americasnli", ["--data-dir", "x"]),
        ("masakhaner", ["--data-dir", "x"]),
        ("files", ["--train", "a=a.csv", "b=b.csv", "--test", "x=x.csv", "--text", "x=x.txt"]),
        ("hub", ["--dataset", "d", "--sources", "a", "--targets", "b"]),
    ],
)
def test_every_preset_has_both_profiles(name, options, parsed, capsys):
    for profile in ("paper", "small"):
        code, _, err = run("run", name, *options, "--profile", profile, capsys=capsys)
        assert code == 0, err
        found = parsed.pop()
        expected = presets.PRESETS[name](found.data)
        if profile == "small":
            expected = presets.small(presets.PRESETS[name], found.data)
        assert found == expected
    code, out, err = run("run", name, "--profile", "small", capsys=capsys)
    assert code == 2
    assert options[0] in out + err


def test_options_of_a_run(parsed, capsys):
    options = "--recipes full deft-x:rank=32,density=0.1 --language-vectors lang --source-vector --seeds 1 2"
    code, _, err = run("run", "nusax", "--data-dir", "x", *options.split(), capsys=capsys)
    assert code == 0, err
    found = parsed.pop()
    assert found.recipes == ["full", "deft-x:rank=32,density=0.1"]
    assert (found.language_vectors, found.source_vector, found.seeds) == (Path("lang"), True, [1, 2])
