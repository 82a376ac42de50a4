"""`jaxsoft devices`: choices, memory, targets, JSON, and input that cannot be."""

import dataclasses
import importlib.util
import json
import os
import re
import stat

import jax
import pytest

from jaxsoft.cli.main import main
from jaxsoft.devices import child, report, report_schedule
from jaxsoft.devices.bundles import UNITS
from jaxsoft.devices.ptx import Kernel
from jaxsoft.devices.target import TARGETS, Target

TINY = "--tokens 8 --hidden 4 --vocabulary 16 --dtype float32".split()


def fails(capsys, *arguments):
    """Runs the command; returns the one line that it says on stderr."""
    try:
        assert main(["devices", *arguments]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_choices_here_and_on_every_target(capsys):
    targets = [word for name in ("here", *TARGETS) for word in ("--target", name)]
    names = ["--op", "softmax", "--op", "linear_statistics", "--op", "entropy"]
    assert main(["devices", *targets, *names]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for pattern in (
        r"here: 8 × cpu \(cpu\)\n  xla:\n    softmax, entropy\n",
        r"h100: NVIDIA H100 80GB HBM3, compute capability 9\.0 \(cuda\)",
        r"  xla; reference or mosaic_gpu if asked for:\n    linear_statistics\n",
        r"v5e: TPU v5e \(tpu\)",
        r"  xla; reference or mosaic_tpu if asked for:\n    linear_statistics\n",
    ):
        assert re.search(pattern, captured.out), pattern
    assert max(map(len, captured.out.splitlines())) <= 88


def test_memory_here_as_a_table_and_as_json(capsys, monkeypatch):
    words = ["devices", "--op", "linear_sample", "--op", "boltzmann_policy", *TINY]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "temporaries in MiB, N = 8, H = 4, V = 16, float32" in table
    assert re.search(r"linear_sample +\| xla \(default\) +\| +0\.0 \| +- \|", table)
    assert "matrix products in N·H·V flops, and GiB read and written" in table
    # The layer's product is 2.00, the rest what a draw adds up inside its block.
    assert re.search(
        r"linear_sample +\| xla \(default\) +\| +4\.50 \| +- \| +0\.00 \| +- \|", table
    )
    assert "gradient of" not in table
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        report.importlib.util,
        "find_spec",
        lambda name: None if name == "rich" else find_spec(name),
    )
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert [line.strip() for line in plain.splitlines() if line.strip()] == [
        line.strip() for line in table.splitlines() if line.strip()
    ]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["shapes"] == {
        "tokens": 8,
        "hidden": 4,
        "vocabulary": 16,
        "dtype": "float32",
        "workspace": None,
    }
    (device,) = said["devices"]
    assert (device["name"], device["platform"]) == ("here", "cpu")
    sample, policy = device["functions"]
    assert (sample["operation"], sample["uses"]) == ("linear_sample", "xla")
    (ran,) = policy["implementations"]
    assert ran["refused"] is None
    assert set(ran["temporaries"]) == {"value", "value_and_grad"}
    assert all(isinstance(size, int) for size in ran["temporaries"].values())
    assert policy["implementations"][0]["plans"] == []
    work = sample["implementations"][0]["work"]["value"]
    # The draw adds up what is before each of four groups, and of four in each.
    inside = 2 * 8 * 4 * (4 + 16)
    assert work["dot_flops"] == 2 * 8 * 4 * 16 + inside and not work["is_least"]
    assert work["accessed"] >= 4 * (8 * 4 + 4 * 16)


def test_the_plan_of_a_workspace_as_text_and_as_json(capsys, monkeypatch):
    # With more devices all classes are kept, or none.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    sizes = "--tokens 512 --hidden 16 --vocabulary 8192 --dtype float32"
    words = ["devices", *sizes.split(), "--workspace", "12MiB"]
    losses = ["--op", "linear_cross_entropy", "--op", "linear_log_prob"]
    assert main([*words, *losses]) == 0
    said = capsys.readouterr().out
    assert "V = 8,192, float32, workspace 12 MiB\n" in said
    chunks = re.search(
        r"\ngradient of linear_cross_entropy: chunks of (\d+) tokens, tiles of ", said
    )
    assert re.search(
        r"\ngradient of linear_log_prob: keeps 0\.\d\d of the classes", said
    )
    assert max(map(len, said.splitlines())) <= 88
    assert main([*words, *losses[:2], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["shapes"]["workspace"] == 12 * 2**20
    (found,) = said["devices"][0]["functions"]
    (plan,) = found["implementations"][0]["plans"]
    assert chunks is not None and plan["chunk_rows"] == int(chunks[1])
    assert (plan["kind"], plan["kept_classes"]) == ("chunks", 8192)


def test_only_functions_that_take_a_workspace_are_shown_with_one(capsys):
    assert main(["devices", *TINY, "--workspace", "1M", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    names = [one["operation"] for one in device["functions"]]
    assert "linear_sample" in names and "nt_xent" in names
    assert not {"softmax", "adaptive_log_prob", "sampled_softmax_loss"} & set(names)


def test_compiling_for_a_target_needs_an_extra(capsys, monkeypatch):
    monkeypatch.setattr(Target, "installed", lambda self: False)
    words = ["devices", "--target", "v6e", "--op", "linear_log_prob", *TINY]
    assert main(words) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    said = "jaxsoft devices: compiling for v6e needs libtpu, which the extra `aot` "
    assert line.startswith(said)
    assert line.endswith('pip install "jaxsoft[aot]"')
    # The rest needs none.
    assert "xla; reference or mosaic_tpu if asked for" in captured.out


def test_a_compiler_that_dies_is_named(capsys, monkeypatch, tmp_path):
    found = {
        "operation": "sample",
        "uses": "xla",
        "implementations": [{"name": "xla", "temporaries": {"value": 3 * 2**20}}],
    }
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho noise of a compiler\n"
        f"echo '{child.PREFIX}{json.dumps(found)}'\n"
        'echo "$@" >arguments\necho "no memory left" >&2\nexit $STOPS\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", os.fspath(script))
    monkeypatch.setattr(Target, "installed", lambda self: True)
    words = ["devices", "--target", "b200", "--op", "sample", *TINY]
    monkeypatch.setenv("STOPS", "0")
    assert main(words) == 0
    assert re.search(r"sample +\| xla \(default\) +\| +3\.0 ", capsys.readouterr().out)
    _, request = (tmp_path / "arguments").read_text().split("child ", 1)
    assert json.loads(request)["shapes"]["vocabulary"] == 16
    monkeypatch.setenv("STOPS", "7")
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said == (
        "jaxsoft devices: the compiler for b200 failed, exit code 7: no memory left\n"
    )


def test_a_schedule_as_text_and_as_json(capsys, monkeypatch, tmp_path):
    busy = dict.fromkeys(UNITS, 0.25) | {"mxu": 0.75}
    loop = {"bundles": 90, "trips": 1000, "cycles": 80_000, "busy": busy}
    end = {"bundles": 4000, "trips": None, "cycles": 9_900, "busy": busy}
    rare = {"bundles": 5, "trips": 7, "cycles": 100, "busy": busy}
    part = {"name": "a_kernel", "runs": 2, "cycles": 90_000, "is_least": False}
    parts = [part | {"loops": [loop, end, rare], "runs_are_least": True}]
    schedule = {"cycles": 180_000, "is_least": True, "busy": busy, "parts": parts}
    work = {"dot_flops": 918 * 10**6, "accessed": 1638 * 10**3, "is_least": False}
    ran = {"name": "xla", "temporaries": {"value": 0}, "work": {"value": work}}
    ran |= {"schedules": {"value": schedule}}
    found = {"operation": "sample", "uses": "xla", "implementations": [ran]}
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\necho '{child.PREFIX}{json.dumps(found)}'\n"
        'echo "$@" >arguments\necho "$LIBTPU_INIT_ARGS" >flags\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", os.fspath(script))
    monkeypatch.setattr(Target, "installed", lambda self: True)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--given=1")
    words = ["devices", "--target", "v6e", "--op", "sample", *TINY, "--schedule"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for pattern in (
        r"v6e: TPU v6e, 1\.75 GHz, 1,638 GB/s, 918 TFLOP/s of bfloat16\n",
        r"least times in ms, N = 8, H = 4, V = 16, float32",
        # Cycles bind: 180,000 of them, at least.
        r"sample +\| xla \(default\) +\| value +\| +≥ 0\.103 \| +0\.001 \| +0\.001 "
        r"\| +≥ 0\.103 \|",
        r"a_kernel \| +0\.89 \| +90 \| +≥ 2,000 \| +0\.75 \| +0\.25 ",
        r"a_kernel \| +0\.11 \| +4,000 \| +\? \| +0\.75 ",
    ):
        assert re.search(pattern, said), (pattern, said)
    assert "temporaries" not in said and said.count("a_kernel") == 2
    _, request = (tmp_path / "arguments").read_text().split("child ", 1)
    folder = json.loads(request)["dumps"]
    flags = (tmp_path / "flags").read_text().split()
    assert flags[0] == "--given=1" and f"--xla_jf_dump_to={folder}" in flags
    assert not os.path.exists(folder)
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (one,) = said["devices"][0]["functions"][0]["implementations"]
    assert one["schedules"] == {"value": schedule}
    assert one["least_seconds"] == {"value": pytest.approx(180_000 / 1.751e9, rel=1e-3)}


@pytest.mark.parametrize(
    "has_ptxas, unknown",
    [
        (True, "instructions are unknown without nvdisasm, which the extra `aot`"),
        (False, "kernels' code is unknown without ptxas and nvdisasm, which the"),
    ],
)
def test_kernels_of_a_gpu_as_text(has_ptxas, unknown, capsys, monkeypatch, tmp_path):
    loop = {"instructions": 51, "matrix": 4, "copies": 0}
    kernels = [
        Kernel("a_fusion", 256, 30, 0, 32, 1.0, None, 0),
        Kernel("a_long_name_of_a_kernel_of_mosaic", 384, 168, 8, None, 0.1875, loop, 9),
        Kernel("a_copy", 128),
    ]
    untold = {"accessed": 3352 * 10**6, "is_least": True, "is_untold": True}
    product = Kernel("a_mosaic_gpu_kernel", 384, 168, 0, None, 0.1875, loop, 9)
    found = {
        "operation": "sample",
        "uses": "xla",
        "implementations": [
            {
                "name": "xla",
                "temporaries": {"value": 0, "value_and_grad": 0},
                "work": {
                    "value": {"dot_flops": 989 * 10**9},
                    "value_and_grad": {"accessed": 3352 * 10**6, "is_least": True},
                },
                "kernels": {"value": [dataclasses.asdict(one) for one in kernels]},
            },
            {
                "name": "mosaic_gpu",
                "temporaries": {"value": 0},
                "work": {"value": untold},
                "kernels": {"value": [dataclasses.asdict(product)]},
            },
        ],
    }
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\necho '{child.PREFIX}{json.dumps(found)}'\n"
        'echo "$XLA_FLAGS" >flags\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", os.fspath(script))
    monkeypatch.setattr(Target, "installed", lambda self: True)
    monkeypatch.setattr(
        report_schedule, "missing_tools", lambda: ["ptxas", "nvdisasm"][has_ptxas:]
    )
    words = ["devices", "--target", "h100", "--op", "sample", *TINY, "--schedule"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert unknown in said
    for pattern in (
        r"xla \(default\) +\| value +\| +1\.000 \| +0\.000 \| +1\.000 \| +- \|",
        # Of products that a kernel does not tell nothing is known.
        r"gradient +\| +≥ 1\.000 \| +≥ 1\.000 \| +\? \| +- \|",
        # Bytes are no bound of a kernel with products.
        r"mosaic_gpu +\| value +\| +\? \| +≥ 1\.000 \| +\? \| +- \|",
        r"a_long_name_of_a_kernel_of_mo… \| +384 \| +168 \| +8 \| unknown \| +≤ 0\.19 "
        r"\| +9 \| +51 \| +4 \| +0 \|",
        r"a_fusion +\| +256 \| +30 \| +0 \| +32 \| +≤ 1\.00 \| +0 \| +- \| +- \| +- \|",
        r"a_copy +\| +128 \| +unknown \|",
    ):
        assert re.search(pattern, said), (pattern, said)
    assert "--xla_dump_to=" in (tmp_path / "flags").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        ("--op softmx", r"--op must be a name such as softmax, .*, got 'softmx'"),
        ("--target h200", r"--target must be a name such as h100, .*, got 'h200'"),
        ("--model llama", r"--model must be a name such as llama3.*, got 'llama'"),
        ("--model qwen3 --hidden 8", r"--hidden must be left out with --model, got 8"),
        ("--hidden 8", r"--vocabulary must be given with other sizes, or else --model"),
        ("--dtype bfloat16", r"--hidden must be given with other sizes"),
        ("--hidden 8 --vocabulary 2", r"--vocabulary must be in \[3, 2\*\*31\), got 2"),
        ("--model qwen3 --tokens 0", r"--tokens must be in \[1, 2\*\*31\), got 0"),
        ("--model qwen3 --dtype int8", r"--dtype must be a name .*, got 'int8'"),
        (
            "--model qwen3 --workspace much",
            r"--workspace must be a size such as 4G, got",
        ),
        (
            "--model qwen3 --workspace 0",
            r"--workspace must be a size such as 4G, got '0'",
        ),
        ("--workspace 1G", r"--hidden must be given with other sizes, or else --model"),
        (
            "--model qwen3 --op linear_sample --op softmax --workspace 1G",
            r"--workspace must be left out with --op softmax, which takes none",
        ),
        ("--model qwen3 --schedule", r"--schedule must be given with --target h100, "),
        ("--target v6e --schedule", r"--schedule must be given with sizes, such as"),
        ("--tokens many", r"argument --tokens: invalid int value: 'many'"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    line = fails(capsys, *words.split())
    assert line.startswith("jaxsoft devices: ") and re.search(said, line), line


@pytest.mark.parametrize(("value", "why"), [("1", "no device"), ("0", "DEFAULT_KER")])
def test_why_a_kernel_is_no_default(value, why, capsys, monkeypatch):
    monkeypatch.setenv("JAXSOFT_DEFAULT_KERNELS", value)
    assert main(["devices", "--target", "v6e", "--op", "softmax"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"mosaic_tpu is no default: \w*{why}", said)
