import argparse
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from peftjax.core import cli
from peftjax.core.errors import UserError


def _run(monkeypatch: pytest.MonkeyPatch, main, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code


def _raising(error: BaseException):
    def main(*arguments: object) -> None:
        raise error

    return main


def test_a_command_gets_its_arguments_and_its_result_is_the_exit_code(monkeypatch):
    assert _run(monkeypatch, len, "a", "b", "c") == 3


def test_a_command_that_returns_nothing_has_succeeded(monkeypatch):
    assert not _run(monkeypatch, lambda argv: None)


@pytest.mark.parametrize("error", [UserError("rank is -1"), FileNotFoundError("rank is -1"), OSError("rank is -1")])
def test_a_user_mistake_is_one_line_without_a_traceback(monkeypatch, capsys, error):
    monkeypatch.delenv("PEFTJAX_TRACEBACK", raising=False)
    assert _run(monkeypatch, _raising(error)) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: rank is -1\n")


@pytest.mark.filterwarnings("default:the base differs")
def test_a_warning_is_one_line_that_names_no_place_in_our_code(monkeypatch, capsys):
    assert not _run(monkeypatch, lambda argv: warnings.warn("the base differs", stacklevel=2))
    assert capsys.readouterr().err == "warning: the base differs\n"


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("PEFTJAX_TRACEBACK", "1")
    with pytest.raises(UserError, match="rank is -1"):
        cli.run(_raising(UserError("rank is -1")))


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("shapes (3,) and (2,) do not match")])
def test_an_error_of_ours_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        cli.run(_raising(error))


def test_an_interrupted_command_exits_with_130(monkeypatch, capsys):
    assert _run(monkeypatch, _raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_real_process_ends_with_2_and_one_line_on_stderr():
    code = "from peftjax.core import cli\ncli.run(lambda argv: open(argv[0]).close())"
    environment = {name: value for name, value in os.environ.items() if name != "PEFTJAX_TRACEBACK"}
    result = subprocess.run(
        [sys.executable, "-c", code, "/no/such/file"], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 2
    assert result.stderr == "error: [Errno 2] No such file or directory: '/no/such/file'\n"


@pytest.mark.parametrize("platform", ["bogus", "rocm"])
def test_a_platform_that_jax_does_not_have_is_one_line_with_the_variable(platform):
    code = "import jax\nfrom peftjax.core import cli\ncli.run(lambda argv: jax.devices())"
    environment = {name: value for name, value in os.environ.items() if name != "PEFTJAX_TRACEBACK"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"JAX_PLATFORMS": platform},
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: JAX_PLATFORMS={platform}: JAX finds no such device")
    assert "Traceback" not in result.stderr


def test_compiled_programs_are_kept_where_the_user_says_or_in_the_users_cache_directory(monkeypatch, tmp_path):
    chosen = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.keep_programs()
    assert jax.config.jax_compilation_cache_dir == chosen == os.environ["JAX_COMPILATION_CACHE_DIR"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        cli.keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "peftjax" / "programs")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # in which no directory can be made
        cli.keep_programs()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _raising(RuntimeError("Could not determine home directory.")))
        cli.keep_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)


def test_parse_separates_the_config_its_overrides_and_the_workdir():
    argv = ["--config=c.py", "--config.seed=3", "--workdir", "runs/a", "--config.data.train=a,b"]
    arguments = cli.parse_command(argv, "train", "Trains.")
    assert arguments.config == "c.py"
    assert arguments.workdir == "runs/a"
    assert arguments.overrides == ["--config.seed=3", "--config.data.train=a,b"]


def test_parse_takes_a_commands_own_options():
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device")

    arguments = cli.parse_command(
        ["--config=c.py", "--device=v5e:4x4"], "plan", "Plans.", workdir=False, options=options
    )
    assert arguments.device == "v5e:4x4"
    assert not hasattr(arguments, "workdir")


@pytest.mark.parametrize("argv", [["--config=c.py"], ["--workdir=w"]])
def test_a_missing_argument_ends_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_command(argv, "train", "Trains.")
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_lists_the_fields_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_command(["--help"], "train", "Trains.")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "python -m peftjax.train" in out
    assert "optim.learning_rate=0.0001" in out
    assert "Peak learning rate" in out


def test_dashes_and_underscores_are_alike_in_the_names_of_options():
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num_processes", type=int)
        parser.add_argument("--max-new-tokens")

    argv = ["--config=a_b-c.py", "--workdir", "run-a_b", "--num-processes=2", "--max_new_tokens=a-b_c"]
    arguments = cli.parse_command([*argv, "--config.train.eval-every=a-b"], "train", "Trains.", options=options)
    assert (arguments.config, arguments.workdir) == ("a_b-c.py", "run-a_b")
    assert (arguments.num_processes, arguments.max_new_tokens) == (2, "a-b_c")
    assert arguments.overrides == ["--config.train.eval_every=a-b"]
    swept = cli.config_fields(["--sweep.train.eval-every=1,2", "--together=2"], "--sweep.")
    assert swept == (["--sweep.train.eval_every=1,2"], ["--together=2"])


def test_a_config_field_without_a_value_is_refused():
    with pytest.raises(UserError, match=r"^--config\.train\.steps needs a value .*--config\.train\.steps=VALUE$"):
        cli.parse_command(["--config=c.py", "--workdir=w", "--config.train.steps", "100"], "train", "Trains.")


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    arguments = cli.parse_command(["--config=~/c.py:a", "--workdir=~/runs"], "train", "Trains.")
    assert (arguments.config, arguments.workdir) == ("/home/ada/c.py:a", "/home/ada/runs")


def test_characters_that_the_encoding_of_stdout_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert not _run(monkeypatch, lambda argv: print("é"))
    assert out.buffer.getvalue() == rb"\xe9" + b"\n"


def test_an_unknown_option_is_one_line_with_a_suggestion() -> None:
    parser = argparse.ArgumentParser(prog="peftjax generate")
    parser.add_argument("--max-new-tokens", type=int)
    assert cli.parse_options(parser, ["--max_new_tokens=3"]).max_new_tokens == 3
    with pytest.raises(
        UserError, match=r"unknown argument --max_tokens=3\. Did you mean '--max-new-tokens'\? peftjax generate"
    ):
        cli.parse_options(parser, ["--max_tokens=3"])
    with pytest.raises(UserError, match=r"unknown argument --confg\.seed=1\. Did you mean '--config'\?"):
        cli.parse_command(["--config=c.py", "--workdir=w", "--confg.seed=1"], "train", "Trains.")
    parser.add_argument("--config")
    with pytest.raises(UserError, match=r"is set by --config\.SECTION\.FIELD=VALUE"):
        cli.parse_options(parser, ["--learning_rate=1e-3"])
