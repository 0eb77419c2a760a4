"""Run one command as several processes of this machine, which find each other over loopback.

    python launch/local.py --processes=4 --devices-per-process=2 -- \\
        python -m peftjax.train --config=configs/quickstart.py --workdir=runs/four --config.mesh.data=-1

`--coordinator=127.0.0.1:PORT --num_processes=N --process_id=I` is appended to the command. docs/launch_local.md tells more.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

STOPPED = 75  # a command's exit code for: stopped by SIGTERM, all saved, run me again
GRACE = 30.0  # seconds that the others get to end by themselves once one has failed


def main(argv: list[str]) -> int:
    """Returns 0 if all processes did, 75 if one was stopped and none failed, else the code of the first that failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        environments = split_devices(os.environ, options.processes, options.devices_per_process)
    except ValueError as error:
        parser.error(str(error))
    processes: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: send(processes, number))
    address = f"127.0.0.1:{free_port()}"
    for index, environment in enumerate(environments):
        flags = [f"--coordinator={address}", f"--num_processes={options.processes}", f"--process_id={index}"]
        try:
            processes.append(start([*options.command, *flags], environment))
        except OSError as error:
            parser.error(f"cannot run {options.command[0]!r}: {error.strerror}")
    printers = [threading.Thread(target=show, args=(index, process)) for index, process in enumerate(processes)]
    for printer in printers:
        printer.start()
    code = wait(processes)
    for printer in printers:
        printer.join()
    return code


def make_parser() -> argparse.ArgumentParser:
    """The options; all that comes after `--` is the command."""
    parser = argparse.ArgumentParser(
        prog="python launch/local.py",
        usage="%(prog)s --processes=N [--devices-per-process=K] -- COMMAND ...",
        description="Run one command as several processes of this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=positive, required=True, metavar="N", help="how many to start")
    parser.add_argument(
        "--devices-per-process", type=positive, default=1, metavar="K", help="GPUs or CPU devices of each (default: 1)"
    )
    parser.add_argument(
        "command", nargs="+", metavar="COMMAND", help="what each runs, as: -- python -m peftjax.train ..."
    )
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def split_devices(environment: Mapping[str, str], processes: int, each: int) -> list[dict[str, str]]:
    """The environment of each process, in which it sees devices of its own: `each` GPUs, or `each` CPU devices.

    The GPUs are those of CUDA_VISIBLE_DEVICES in their order, else 0, 1, ...; an empty one hides them from all.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names fewer than are needed.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [str(index) for index in range(processes * each)] if named is None else [gpu for gpu in named.split(",") if gpu]
    )
    if 0 < len(gpus) < processes * each:
        raise ValueError(
            f"{processes} processes of {each} devices need {processes * each} GPUs, but CUDA_VISIBLE_DEVICES={named} "
            f"names {len(gpus)}; lower --processes or --devices-per-process, or unset it"
        )
    cpus = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={each}"  # the last one counts
    return [
        {**environment, "XLA_FLAGS": cpus, "CUDA_VISIBLE_DEVICES": ",".join(gpus[index * each : (index + 1) * each])}
        for index in range(processes)
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own: Ctrl-C in a terminal reaches this launcher only, which passes it on once."""
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def show(index: int, process: subprocess.Popen[bytes]) -> None:
    """Print each line of the process's output after its index, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(b"[%d] %s\n" % (index, line.rstrip(b"\n")))  # one write: lines do not mix
        sys.stdout.buffer.flush()


def send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing where the process has ended


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The exit code for all, when all have ended. When one fails the others get SIGTERM, and SIGKILL after `GRACE`."""
    failed, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:  # a list: every one is polled
        if not failed and (failed := first_failure(processes)):
            print(f"a process failed with exit code {failed}; stopping the others", file=sys.stderr, flush=True)
            send(processes, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
        time.sleep(0.05)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind
    stopped = any(process.returncode == STOPPED for process in processes)
    return failed or first_failure(processes) or (STOPPED if stopped else 0)


def first_failure(processes: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first that failed, as a shell gives it: 128 + n for signal n; 0 if none has failed."""
    codes = (process.returncode for process in processes)
    return next((code if code > 0 else 128 - code for code in codes if code not in (None, 0, STOPPED)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
