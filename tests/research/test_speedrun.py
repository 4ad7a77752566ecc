"""The speedrun: its commands fit the scripts they call, and the road is resumable at every step."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fvlm.config import REPOSITORY, load_config
from fvlm.data.chat import load_tokenizer
from fvlm.model.flops import Sample, flops_per_sample
from fvlm.research.ablation.matrix import load_matrix
from fvlm.research.speedrun.cost import command_flops, known_rate
from fvlm.research.speedrun.run import SCALES, Machine, load_scale, main
from fvlm.research.study.workload import StatedSample
from fvlm.schema import ConfigError
from fvlm.train.build import geometry

NAMES = sorted(path.stem for path in SCALES.glob("*.yaml"))
NOTE = "python -c \"import sys; open('$out/log', 'a').write(sys.argv[1])\" "


def scale_file(folder: Path, *steps: dict) -> str:
    path = folder / "scale.yaml"
    made = [{"name": f"s{number}", "says": "It.", **step} for number, step in enumerate(steps)]
    path.write_text(yaml.safe_dump({"about": "A road.", "steps": made}))
    return str(path)


def run(folder: Path, *steps: dict) -> tuple[int, str]:
    """Exit code, and what the commands have noted so far."""
    code = main(["--scale", scale_file(folder, *steps), "--out", str(folder / "out")])
    log = folder / "out" / "log"
    return code, log.read_text() if log.exists() else ""


def test_done_steps_are_passed_over(tmp_path):
    steps = [{"run": [NOTE + "a", NOTE + "b"]}, {"run": [NOTE + "c"]}]
    assert run(tmp_path, *steps) == (0, "abc")
    assert run(tmp_path, *steps) == (0, "abc")


def test_a_failed_step_is_done_again_and_those_before_are_not(tmp_path, capfd):
    broken = [{"run": [NOTE + "a"]}, {"run": [NOTE + "b", "python -c 'raise SystemExit(3)'"]}, {"run": [NOTE + "c"]}]
    assert run(tmp_path, *broken) == (1, "ab")
    assert "s1 failed with exit code 3" in capfd.readouterr().err
    mended = [broken[0], {"run": [NOTE + "d"]}, broken[2]]
    assert run(tmp_path, *mended) == (0, "abdc")


def test_what_rests_on_a_changed_step_is_done_again(tmp_path):
    steps = [{"run": [NOTE + letter]} for letter in "abc"]
    assert run(tmp_path, *steps) == (0, "abc")
    steps[1] = {"run": [NOTE + "x"]}
    assert run(tmp_path, *steps) == (0, "abcxc")


def test_a_no_ends_the_road_unless_the_step_may_say_no(tmp_path):
    no = {"run": ["python -c 'raise SystemExit(1)'"]}
    assert run(tmp_path, no, {"run": [NOTE + "a"]}) == (1, "")
    assert run(tmp_path, {**no, "may_say_no": True}, {"run": [NOTE + "a"]}) == (0, "a")
    record = json.loads((tmp_path / "out" / "speedrun.json").read_text())
    assert [record["steps"][name]["said"] for name in ("s0", "s1")] == ["no", "yes"]


def test_a_signal_ends_the_command_and_the_same_call_goes_on(tmp_path):
    waits = "python -c \"import time, pathlib; pathlib.Path('$out/began').touch(); time.sleep(60)\""
    scale = scale_file(tmp_path, {"run": [NOTE + "a"]}, {"run": [waits]})
    command = [sys.executable, "-m", "fvlm.research.speedrun.run", "--scale", scale, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped in s1; the same command goes on" in told
    assert run(tmp_path, {"run": [NOTE + "a"]}, {"run": [NOTE + "b"]}) == (0, "ab")


LAUNCHER = """
import os, pathlib, signal, subprocess, sys
if "RANK" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "saved").touch(), os._exit(75)))
    pathlib.Path(sys.argv[1], "began").touch()
    signal.pause()
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, "RANK": "0"}).returncode)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_ranks_behind_a_launcher_that_passes_nothing_on_are_told_and_save(number, tmp_path):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    scale = scale_file(tmp_path, {"run": [f"python {tmp_path}/launcher.py $out"]})
    command = [sys.executable, "-m", "fvlm.research.speedrun.run", "--scale", scale, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as Ctrl-C does; a study's SIGTERM reaches the process alone
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "out" / "saved").exists()


def test_a_mistake_in_the_last_step_is_found_before_the_first(tmp_path, capsys):
    code, log = run(tmp_path, {"run": [NOTE + "a"]}, {"run": ["echo $nowhere"]})
    assert (code, log) == (2, "")
    assert "s1" in (said := capsys.readouterr().err)
    assert "nowhere" in said
    assert "$out" in said


def test_a_folder_of_another_scale_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "speedrun.json").write_text(json.dumps({"scale": "full", "steps": {}}))
    assert run(tmp_path, {"run": [NOTE + "a"]}) == (2, "")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_fits_the_script_that_it_calls(name, tmp_path, monkeypatch):
    machine = Machine(out=tmp_path, ranks=2)
    scripts = set()
    for step in load_scale(name).steps:
        for command in machine.commands(step):
            module, arguments = script_of(command)
            scripts.add(module)
            parse = importlib.import_module(module).parse
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            asked = parse(arguments) if inspect.signature(parse).parameters else parse()
            if module == "launch.ablate":
                matrix = load_matrix(asked.matrix)
                assert set(asked.only) <= matrix.arms.keys() | matrix.questions.keys()
            if module == "launch.train":
                load_config(asked.config, asked.overrides)
    assert {f"launch.{each}" for each in ("train", "evaluate", "ablate", "scaling_grid", "report", "export")} <= scripts


def script_of(command: list[str]) -> tuple[str, list[str]]:
    """Module that a command runs, and its arguments."""
    if command[:2] == ["python", "-m"]:
        package = "data_prep.synthetic.__main__" if command[2] == "data_prep.synthetic" else command[2]
        return package, command[3:]
    place = next(i for i, word in enumerate(command) if word.startswith("launch/"))
    return command[place].removesuffix(".py").replace("/", "."), command[place + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_the_dry_run_counts_all_that_is_trained_without_the_data(name, tmp_path, capsys):
    assert (
        main(["--scale", name, "--out", str(tmp_path / "out"), "--dry-run", "--tflops", "0.5", "--devices", "1"]) == 0
    )
    said = capsys.readouterr().out
    assert "not counted" not in said
    assert "TFLOP/s in all, as --tflops says" in said
    assert all(f"] {step.name}:" in said for step in load_scale(name).steps)
    assert not (tmp_path / "out").exists()


def test_operations_of_a_run_and_of_ablations(tmp_path):
    sample = StatedSample(frames=5, text_tokens=40, labels=10)
    one = ["python", "launch/train.py", "--config", "demo", f"data.train=[{tmp_path}]"]
    config = load_config("demo")
    model = geometry(config.model, len(load_tokenizer("tiny")))
    shape = Sample.video_first(model, frames=5, text_tokens=40, labels=10)
    each = flops_per_sample(model, shape, mode="coarse_fine", fine_iterations=(1, 2)).training
    assert command_flops(one, sample) == pytest.approx(each * 28000, rel=1e-9)
    arms = ["python", "launch/ablate.py", "--base", "demo", f"data.train=[{tmp_path}]", "--only", "F3", "A6"]
    cheap = flops_per_sample(model, shape, mode="coarse_only", fine_iterations=(1, 2)).training
    assert command_flops(arms, sample) == pytest.approx((each + cheap) * 28000, rel=1e-9)
    assert command_flops([*arms, "--seeds", "0", "1"], sample) == pytest.approx(2 * (each + cheap) * 28000, rel=1e-9)
    assert command_flops(["python", "launch/report.py", "x"], sample) == 0
    with pytest.raises(ConfigError):
        command_flops(one, None)


def test_the_measured_rate_comes_first(tmp_path):
    speed = tmp_path / "speed.json"
    assert known_rate(speed, None, None, 2) is None
    assert known_rate(speed, 0.5, "h100", 2).flops == 1e12
    assert known_rate(speed, None, "h100", 1).flops == pytest.approx(0.25 * 989e12)
    speed.write_text(json.dumps({"figures": {"product/mfu": 0.4, "peak_tflops": 0.2}}))
    assert known_rate(speed, 0.5, "h100", 2).flops == pytest.approx(2 * 0.4 * 0.2e12)


def test_help_teaches_without_a_scale(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "bash launch/speedrun.sh --scale demo" in capsys.readouterr().out


def test_the_shell_script_hands_everything_on(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(REPOSITORY / "launch" / "speedrun.sh"), "--scale", "nowhere"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "demo, full" in ended.stderr
