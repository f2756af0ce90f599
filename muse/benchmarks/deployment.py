"""``benchmark=deployment``: whether ``python -m muse.serve`` works on this machine, as a process."""

from __future__ import annotations

import copy
import dataclasses
import logging
import platform
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from muse.benchmarks.benchmark import Benchmark
from muse.benchmarks.results import Results, name_of
from muse.benchmarks.server import model_to_serve, running_server
from muse.config import BenchConfig
from muse.errors import RunError
from muse.export import write_exported
from muse.hardware import describe
from muse.models import build_model
from muse.report.sweep_plot import Metric
from muse.runs.provenance import package_version
from muse.serve import PACKAGES, require
from muse.trained import Trained, load

# Of the extra ``serve``; imported where they are used.
NEEDED = (*PACKAGES, "httpx")
# By name, in the order in which they are told: what is checked, and what must be found.
CHECKS = {
    "model": ("weights, tokenizer, versions and device of the server", "those that are here"),
    "ready": ("ready only after the test of itself", "bits are invariant"),
    "greedy": ("greedy answers beside muse.generate", "equal"),
    "company": ("32 requests at a time beside one at a time", "equal bits"),
    "invalid": ("values that are not allowed", "400, naming them"),
    "key": ("no key, or a wrong one", "401"),
    "unknown": ("unknown route or model", "404"),
    "method": ("a method that a route has not", "405, Allow"),
    "late_body": ("a body that never comes", "408"),
    "large_body": ("more than 1 MiB", "413"),
    "content_type": ("another type than JSON", "415"),
    "queue": ("a full queue", "429, Retry-After"),
    "nonfinite": ("a logit that is no number, beside others", "500, alone"),
    "draining": ("a request while the server ends", "503, Retry-After"),
    "time_limit": ("longer than the time limit", "504"),
    "time_limit_stream": ("the same in a stream", "a last event"),
    "disconnects": ("100 clients that leave", "no slot taken"),
    "damaged": ("weights with a NaN that every request meets", "no start, status 1"),
    "stopped": ("a process that is stopped, and goes on", "timeout, same answer"),
    "killed": ("a process that is killed in a stream", "the stream breaks off"),
    "restart": ("answers after a restart", "equal bits"),
    "sigterm": ("SIGTERM in the middle of streams", "answers, status 0"),
}
# Of the server that is started again.
SECOND = (
    "restart",
    "key",
    "invalid",
    "unknown",
    "method",
    "large_body",
    "content_type",
    "draining",
    "sigterm",
)
# Of the server that has little: its queue is as long as what one request may ask for.
SLOTS, QUEUE, TIME_LIMIT = 1, 255, 2
# Seconds of a server to end in, and that its process may take beyond them.
DRAIN, BEYOND = 20, 120
# Answers that are compared before and after, and beside a request that fails.
FEW = 4


class Scenes:
    """What was found by the checks so far.

    Attributes:
        found: by name of the check what was seen and whether it passed.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def see(self, name: str, check: Callable[..., str], *arguments: Any) -> None:
        """Run a check, which returns what it has seen, or raises."""
        try:
            seen, passed = check(*arguments), True
        except Exception as error:  # noqa: BLE001 - a server that is not well may answer anything
            kind = "" if type(error).__name__ == "Failed" else f"{type(error).__name__}: "
            seen, passed = f"{kind}{error}", False
        self.found[name] = {"seen": seen, "passed": passed}
        print(f"  {CHECKS[name][0]}: {seen if passed else f'FAILED, {seen}'}", flush=True)

    @contextmanager
    def of(self, *names: str) -> Iterator[None]:
        """Checks that fail where their server does."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - as above; the other servers are checked all the same
            reason = f"{type(error).__name__}: {error}"
            for name in names:
                if name not in self.found:
                    self.see(name, _raise, reason)


def _raise(reason: str) -> str:
    raise RunError(reason)


def measure_deployment(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Start servers of a model, and go through all checks.

    The files that it needs are written to ``output_root``, and damaged weights are removed again.

    Returns:
        ``checks``: by name ``seen``, in words, and ``passed``; ``versions`` of what serves.

    Raises:
        ConfigError, RunError: there is no model.
    """
    # A line for each request would bury what is found.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = Path(config.output_root)
    place = model_to_serve(config, folder)
    trained = load(place, device=device)
    scenes = Scenes()
    server = Servers(place, folder, trained)
    answers: list[dict[str, Any]] = []
    with scenes.of("model", "ready", "greedy", "company", "stopped", "killed"):
        answers += _first(server, scenes)
    with scenes.of(*SECOND):
        _restarted(server, scenes, answers)
    with scenes.of("queue", "time_limit", "time_limit_stream", "late_body", "disconnects"):
        _limited(server, scenes)
    with scenes.of("damaged", "nonfinite"):
        _damaged(server, scenes)
    versions = {name: package_version(name.replace("_", "-")) for name in ("torch", *NEEDED)}
    return {
        "checks": {name: scenes.found[name] for name in CHECKS if name in scenes.found},
        "versions": {"python": platform.python_version(), **versions},
        "served_on": describe(device),
    }


@dataclasses.dataclass(frozen=True)
class Servers:
    """Starts servers of one model.

    Attributes:
        place: of the model.
        folder: for what they print, and for damaged weights.
        trained: the model, without a server.
    """

    place: Path
    folder: Path
    trained: Trained

    @contextmanager
    def running(self, *options: object, place: Path | None = None, key: str = "") -> Iterator[Any]:
        """A server with options of the command, and a target for checks, while the block lasts."""
        from muse.benchmarks.deployment_checks import Target, client_of

        tokenizer, config = self.trained.tokenizer, self.trained.config
        assert tokenizer is not None
        device = next(self.trained.model.parameters()).device.type
        # Threads are a part of what the server says it runs on.
        environment = {"MUSE_API_KEY": key, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        arguments = ("--device", device, "--cache-mb", 0, *options)
        with (
            running_server(place or self.place, self.folder, *arguments, environment=environment) as server,
            client_of(server.address, key) as client,
        ):
            yield server, Target(client, tokenizer, tokenizer.vocab_size, config.model.seq_len)


def _first(servers: Servers, scenes: Scenes) -> list[dict[str, Any]]:
    """A server as it is by default, without stored answers; answers of it."""
    from muse.benchmarks import deployment_checks as checks
    from muse.benchmarks import deployment_ends as ends
    from muse.serving.served import fingerprint

    offline = servers.trained._replace(model=copy.deepcopy(servers.trained.model).float())
    port, ended = free_port(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(checks.first_answer, f"http://127.0.0.1:{port}", ended)
        try:
            # No request is so long that its time is over while the process is stopped.
            with servers.running("--port", port, "--time-limit", 3600) as (server, target):
                scenes.see("ready", lambda: checks.ready_after_test(target, *first.result()))
                scenes.see("model", checks.same_model, target, fingerprint(servers.trained))
                scenes.see("greedy", checks.greedy_as_offline, target, offline)
                bodies = checks.questions(target, checks.CLIENTS)
                scenes.see("company", checks.same_in_company, target, bodies)
                answers = [checks.ask(target, body) for body in bodies[:FEW]]
                scenes.see("stopped", ends.stopped, target, server.process, bodies[0], answers[0])
                scenes.see("killed", ends.killed, target, server.process)
        finally:
            ended.set()
    return answers


def _restarted(servers: Servers, scenes: Scenes, answers: list[dict[str, Any]]) -> None:
    """The same again, with a key, until it is told to end."""
    from muse.benchmarks import deployment_checks as checks
    from muse.benchmarks import deployment_ends as ends
    from muse.benchmarks.deployment_refusals import invalid_cases, key_cases, other_cases, refused

    options = ("--time-limit", 3600, "--drain", DRAIN)
    with servers.running(*options, key=checks.KEY) as (server, target):
        bodies = checks.questions(target, checks.CLIENTS)[: len(answers)]
        scenes.see("restart", checks.same_as_before, target, bodies, answers)
        scenes.see("key", refused, target, key_cases())
        scenes.see("invalid", refused, target, invalid_cases(target))
        for name, status in (("unknown", 404), ("method", 405), ("large_body", 413), ("content_type", 415)):
            scenes.see(name, refused, target, other_cases()[status])
        ending = ends.end_in_streams(target, server.process, DRAIN + BEYOND)
        scenes.see("draining", ends.refused_while_ending, ending)
        scenes.see("sigterm", ends.ended_with_answers, ending)


def _limited(servers: Servers, scenes: Scenes) -> None:
    """A server that has one slot, and little time for each request."""
    from muse.benchmarks import deployment_ends as ends
    from muse.benchmarks.deployment_refusals import body_that_never_comes

    options = ("--slots", SLOTS, "--queue", QUEUE, "--time-limit", TIME_LIMIT)
    with servers.running(*options) as (_, target):
        scenes.see("queue", ends.queue_full, target)
        scenes.see("time_limit", ends.too_slow, target, False)
        scenes.see("time_limit_stream", ends.too_slow, target, True)
        scenes.see("late_body", body_that_never_comes, target)
        scenes.see("disconnects", ends.left_alone, target)


def _damaged(servers: Servers, scenes: Scenes) -> None:
    """A server whose weights have a NaN."""
    from muse.benchmarks import deployment_checks as checks
    from muse.benchmarks import deployment_ends as ends

    scenes.see("damaged", _refuses_to_start, servers)
    last = servers.trained.tokenizer.vocab_size - 1 if servers.trained.tokenizer else 0
    with (
        damaged_weights(servers, last) as place,
        servers.running("--time-limit", 3600, place=place) as (_, target),
    ):
        bodies = checks.questions(target, FEW, greedy=True)
        scenes.see("nonfinite", ends.one_fails_alone, target, last, bodies)


def _refuses_to_start(servers: Servers) -> str:
    """See that a server does not start whose weights have a NaN in what its test of itself reads."""
    with damaged_weights(servers, 0) as place:
        try:
            with servers.running(place=place):
                pass
        except RunError as error:
            said = str(error)
        else:
            raise RunError("it started")
    if "status 1 " not in said or "error: " not in said:
        raise RunError(said)
    return said.partition("error: ")[2].partition(",")[0]


@contextmanager
def damaged_weights(servers: Servers, token: int) -> Iterator[Path]:
    """A file with the model and a NaN in the embedding of one token, while the block lasts.

    A head that shares its rows is written apart: every logit of it would be none.
    """
    model, tokenizer, config = servers.trained
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    stage = dataclasses.replace(config.stage, tied=False)
    if model.head is None:
        state["head.weight"] = state["embedding.weight"].flatten(1).clone()
    state["embedding.weight"][token].view(-1)[0] = torch.nan
    size = len(state["embedding.weight"])
    untied = build_model(stage, config.model, size, config.seed)
    untied.load_state_dict(state)
    options = dataclasses.asdict(dataclasses.replace(config, stage=stage))
    file = servers.folder / "damaged.safetensors"
    write_exported(file, untied, options, 0, tokenizer)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def judge(config: BenchConfig, results: Results) -> None:
    """A criterion for each check; one that was not reached has failed."""
    own = dataclasses.replace(config, output_root=str(results.folder))
    measured = results.run("deployment", own)
    for name, (title, target) in CHECKS.items():
        found = (measured["checks"] or {}).get(name) or {}
        passed = found.get("passed", False) if measured else None
        results.values[f"deployment_{name}_pass"] = passed
        results.criteria.append((title, found.get("seen", "not reached"), target, passed))
    if measured:
        passed = sum(found["passed"] for found in measured["checks"].values())
        results.values |= {"deployment_passed": passed, "deployment_checks": len(CHECKS)}
        results.details["deployment"] = {
            name_of(config): {**measured["versions"], "served on": measured["served_on"]}
        }


def check(config: BenchConfig) -> None:
    """See that all packages are there.

    Raises:
        ConfigError: one is not.
    """
    require("benchmark=deployment", NEEDED)


BENCHMARK = Benchmark(
    measure={"deployment": measure_deployment},
    judge=judge,
    shown=(Metric("deployment_passed", "checks of the deployment that passed"),),
    stages=("0", "1", "2", "3", "3a"),
    check=check,
    strict=True,
)
