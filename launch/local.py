"""Run a command as several processes on this machine, connected over loopback.

    python launch/local.py --processes=4 -- \\
        python -m peftjax.train --config=configs/quickstart.py --workdir=runs/four --config.mesh.data=-1

`--coordinator=127.0.0.1:PORT --num_processes=N --process_id=I` is appended to the command. See docs/launch_local.md.

The script does not import peftjax, so that it also runs other commands and other environments.
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
from collections.abc import Collection, Mapping

STOPPED = 75  # exit code of a command that was stopped by SIGTERM, saved its state and should run again
INTERRUPTED = 128 + signal.SIGINT  # exit code of a command that was stopped by Ctrl-C
GRACE = 30.0  # seconds between SIGTERM and SIGKILL for the other processes after a failure


def main(argv: list[str]) -> int:
    """Run the command and wait for all processes.

    Returns:
        0 if all processes succeeded, 75 (or 130 after Ctrl-C) if one was stopped and none failed, else the exit code of the
        first failure.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        environments = split_devices(os.environ, options.processes, options.devices_per_process)
    except ValueError as error:
        parser.error(str(error))
    processes: list[subprocess.Popen[bytes]] = []
    stops = {STOPPED}  # exit codes of processes that were asked to stop

    def forward(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            stops.add(INTERRUPTED)
        send(processes, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
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
    code = wait(processes, stops)
    for printer in printers:
        printer.join()
    return code


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; everything after `--` is the command."""
    parser = argparse.ArgumentParser(
        prog="python launch/local.py",
        usage="%(prog)s --processes=N [--devices-per-process=K] -- COMMAND ...",
        description="Run a command as several processes on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=positive, required=True, metavar="N", help="Number of processes")
    parser.add_argument(
        "--devices-per-process",
        type=positive,
        default=1,
        metavar="K",
        help="GPUs or CPU devices per process (default: 1)",
    )
    parser.add_argument(
        "command", nargs="+", metavar="COMMAND", help="Command of each process, as in: -- python -m peftjax.train ..."
    )
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def split_devices(environment: Mapping[str, str], processes: int, each: int) -> list[dict[str, str]]:
    """Make the environment of each process, with disjoint sets of visible GPUs and a number of CPU devices.

    GPUs are assigned in the order of CUDA_VISIBLE_DEVICES, or as 0, 1, ... if it is unset. If it is empty, no process sees
    a GPU.

    Args:
        environment: Environment of this process.
        processes: Number of processes.
        each: GPUs or CPU devices per process.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES lists too few GPUs.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [str(index) for index in range(processes * each)] if named is None else [gpu for gpu in named.split(",") if gpu]
    )
    if 0 < len(gpus) < processes * each:
        raise ValueError(
            f"{processes} processes of {each} devices need {processes * each} GPUs, but CUDA_VISIBLE_DEVICES={named} "
            f"lists {len(gpus)}; reduce --processes or --devices-per-process, or unset CUDA_VISIBLE_DEVICES"
        )
    cpus = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={each}"  # the last occurrence takes effect
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
    """Start a process in its own session, so that Ctrl-C reaches only this launcher, which forwards it once."""
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def show(index: int, process: subprocess.Popen[bytes]) -> None:
    """Print the output of a process until it ends, each line prefixed with the process index.

    If the launcher's output is closed, as by `| head`, the process fails the next time it prints.
    """
    assert process.stdout is not None
    with process.stdout:
        try:
            for line in process.stdout:
                sys.stdout.buffer.write(b"[%d] %s\n" % (index, line.rstrip(b"\n")))  # a single write keeps lines intact
                sys.stdout.buffer.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer


def send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # no effect on a process that has exited


def wait(processes: list[subprocess.Popen[bytes]], stops: Collection[int] = (STOPPED,)) -> int:
    """Wait until all processes have exited and return the exit code of the launcher.

    If one fails, the others receive SIGTERM, and SIGKILL after `GRACE` seconds. The exit codes in `stops` are no failures.
    """
    failed, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:  # a list, so that every process is polled
        if not failed and (failed := first_failure(processes, stops)):
            with contextlib.suppress(BrokenPipeError):
                print(f"a process failed with exit code {failed}; stopping the others", file=sys.stderr, flush=True)
            send(processes, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
        time.sleep(0.05)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # orphaned child processes
    return failed or first_failure(processes, stops) or max(exit_codes(processes))


def first_failure(processes: list[subprocess.Popen[bytes]], stops: Collection[int]) -> int:
    """Return the exit code of the first failed process, or 0."""
    return next((code for code in exit_codes(processes) if code and code not in stops), 0)


def exit_codes(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes of the processes that have exited as a shell reports them: 128 + n for signal n."""
    codes = (process.returncode for process in processes)
    return [code if code >= 0 else 128 - code for code in codes if code is not None]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
