"""The command `longfactory`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from longfactory import __version__, launch, startup, terminal
from longfactory.errors import PEER_LOST, STOPPED, Stopped, UserError, disk_sentence
from longfactory.processes import die_with_parent
from longfactory.train.survival import launched
from longfactory.train.survival.start import begin, take_lock
from longfactory.train.survival.words import lost_connection, stopped_before_training

if TYPE_CHECKING:
    from longfactory.config import RunConfig
    from longfactory.train.survival.watch import Watch

USAGE = """\
LongFactory {version}: post-train language models on sequences of any length.

  longfactory init   sft|dpo|kto|rm|pt           write a run's YAML with comments; --model, --data, --lora
  longfactory train  run.yaml [key=value ...]    train, evaluate
  longfactory plan   run.yaml [--gpus 8 ...]     predict the memory and time of a run, without a GPU
  longfactory verify run.yaml [key=value ...]    prove on the run's own model and data that sharding changes no gradient
  longfactory teach  run.yaml [key=value ...]    run the teacher or reference model alone and cache what training needs of it
  longfactory eval   run.yaml [lengths=...]      long-context evaluation: retrieval by length and depth, loss by position
  longfactory export run.yaml [key=value ...]    merge LoRA adapters, write a plain model, push it
  longfactory expand model_name_or_path=... export_dir=... num_expand=8    add layers for use_llama_pro
  longfactory chat   run.yaml [key=value ...]    talk to a model
  longfactory api    run.yaml [key=value ...]    an OpenAI-compatible server: transformers', or vLLM's with infer_backend=vllm
  longfactory webui  [--port 7860 ...]           a page to compose, start, follow and compare runs
  longfactory env                                what is installed, for a bug report
  longfactory schema                             JSON schema of the YAML, for editors
  longfactory completion bash|zsh|fish           a script that completes commands and keys
  longfactory version

  longfactory train run.yaml --dry_run           resolve and check a run, print it, and stop
  longfactory train --help [word]                list every key, or those that match a word

Keys have LLaMA-Factory's names; --key value works as well as key=value. One line shards a sequence over devices:
  sequence_parallel_size: 8
"""
# What comes before a command's own list of options or keys.
ABOVE = {
    "plan": (
        """\
longfactory plan run.yaml [key=value ...] [--gpus 8xH200 ...]
  The run is taken from its file and key=value words; each option below overrides the matching key (docs/planning.md).
"""
    ),
    "eval": (
        """\
Keys of this command, given on the command line only (docs/long_context.md)
  lengths=4096,16384  depths=0,0.25,0.5,0.75,1  samples=3
      Lengths of the texts in tokens, depth of the needle as a fraction of the text, and
      number of texts for each combination.
  tasks=needle,needles,chain,common
      Kinds of texts to generate.
  documents=a.txt,b.jsonl
      Long texts whose loss by position is measured.
  report_dir=.
      Folder that long_context.json and long_context.png are written to.

"""
    ),
    "verify": (
        """\
Keys of this command, given on the command line only (docs/verify.md)
  verify_rows=2
      Micro-batches per data-parallel group in the step that is compared.
  verify_tokens=2048
      Longest row; longer ones are shortened to the last tokens of each document.
      (On a CPU the default is a length that takes about a minute.)
  --json FILE, --html FILE
      The report as JSON, and as one page with pictures.

"""
    ),
}


def train(argv: list[str], watch: Watch | None = None) -> int:
    """`longfactory train`. Returns the exit status.

    Args:
        argv: the words of the command.
        watch: of a process that a launcher has started.
    """
    from longfactory.config import load_config, resolved
    from longfactory.config.parallel_checks import processes
    from longfactory.config.show import processes as planned_processes

    worker = launch.is_worker()
    startup.begin(launcher=worker)
    cfg = load_config(argv)
    if not worker or (_rank() == 0 and launched.TOLD not in os.environ):
        for note in cfg.notes:  # once: our own launcher has told them
            print(f"note: {note}", file=sys.stderr)
    if cfg.output.dry_run:
        known = planned_processes(cfg)
        problems = list(processes(cfg, known)) if known is not None else []
        if _rank() == 0:
            problems += _look(cfg)
        if problems:
            raise UserError("\n".join(problems))
        from longfactory.train.memory_plan import check_model

        for note in check_model(cfg):
            print(f"note: {note}", file=sys.stderr)
        if _rank() == 0:
            print(resolved(cfg))
            print("# No problem was found. Run the same command without --dry_run to start.")
        return 0
    if cfg.model.infer_backend == "vllm":  # which starts processes of its own
        from longfactory.output.predict_vllm import predict

        _set_up_log()
        predict(cfg)
        return 0
    if launch.is_on("USE_RAY") and not worker:
        from longfactory.ray_launch import start_on_ray

        return start_on_ray(cfg, argv)
    if (status := _start("train", cfg, argv)) is not None:
        return status
    from longfactory.train.run import run

    with _watched(watch) as mine:
        run(cfg, mine)
    return 0


def _set_up_log() -> None:
    """Our own log, and what other packages say once, of a command that is one process. After the
    import of transformers, which would put a handler of its own beside ours.
    """
    import transformers.utils.logging

    transformers.utils.logging.get_logger()
    terminal.set_up(_rank() == 0)


def _look(cfg: RunConfig) -> list[str]:
    """The problems of a run that can be seen from what lies on this machine; prints what could not
    be checked.
    """
    from longfactory.dry_run import look

    _set_up_log()
    found = look(cfg)
    for label, lines in (("note", found.notes), ("not checked", found.unchecked)):
        for line in lines:
            print(f"{label}: {line}", file=sys.stderr)
    return found.problems


def _start(command: str, cfg: RunConfig, argv: list[str]) -> int | None:
    """Starts the run's processes with `command` and returns their exit status; None in a process
    that is to do the work itself.
    """
    from longfactory.config import accelerate_launch
    from longfactory.config.parallel_checks import processes

    launch.quiet_torch()
    if not launch.is_worker():
        local = launch.local_processes(cfg)
        nodes = launch.number("NNODES", 1)
        elastic = "RDZV_ID" in os.environ
        problems = [] if elastic else list(processes(cfg, local * nodes))
        if problems:
            raise UserError("\n".join(problems))
        launch.set_environment(local)
        if launch.needs_torchrun(cfg, local):
            with _locked(cfg, command) as locked:
                return launch.start(
                    "longfactory.cli",
                    [command, *argv],
                    local,
                    stop_signals=cfg.limits.stop_signals,
                    grace=cfg.limits.signal_grace,
                    startup=cfg.limits.startup_timeout,
                    locked=locked,
                )
    else:
        launch.set_environment(launch.number("LOCAL_WORLD_SIZE", 1))
    accelerate_launch.forget(os.environ)  # the run has its keys
    return None


@contextlib.contextmanager
def _locked(cfg: RunConfig, command: str) -> Iterator[bool]:
    """The output folder is this run's, through restarts of its processes. On the first machine; of
    an elastic run it is not known which that is, and the first process locks it. Whether it is
    locked here.
    """
    if command != "train" or "RDZV_ID" in os.environ or launch.number("NODE_RANK", 0) != 0:
        yield False
        return
    held = take_lock(cfg.output_dir)
    if held.note is not None:
        print(f"note: {held.note}", file=sys.stderr)
    try:
        yield True
    finally:
        held.release()


@contextlib.contextmanager
def _watched(watch: Watch | None) -> Iterator[Watch | None]:
    """The watch over the work itself: the one that a worker began with, else a new one."""
    if watch is not None:
        yield watch
        return
    own = begin()
    try:
        yield own
    finally:
        if own is not None:
            own.close()


def verify(argv: list[str], watch: Watch | None = None) -> int:
    """Exit status 0 where every gradient is the same, 1 where one is not."""
    from longfactory.config import load_config

    words: list[str] = []
    numbers: dict[str, int] = {}
    files: dict[str, Path] = {}
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        key, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in ("json", "html"):
            value = value or (queue.pop(0) if queue else "")
            elsewhere = _rank() > 0 or launch.number("NODE_RANK", 0) > 0
            if not value or not (elsewhere or Path(value).absolute().parent.is_dir()):
                raise UserError(f"--{key} {value}: write --{key} FILE, in a folder that exists.")
            files[key] = Path(value)
        elif key not in ("verify_rows", "verify_tokens"):
            words.append(word)
        elif not value.isdigit() or int(value) < 1:
            raise UserError(f"{word}: write {key}=N with a whole number of at least 1.")
        else:
            numbers[key.removeprefix("verify_")] = int(value)
    # A place where nothing can be: the comparison makes a private folder for each process.
    cfg = load_config([*words, f"output_dir={os.path.join(os.devnull, 'longfactory-verify')}"])
    if (status := _start("verify", cfg, argv)) is not None:
        return status
    from longfactory.train.verify import as_html, as_json
    from longfactory.train.verify import verify as compare

    rows, tokens = numbers.get("rows", 2), numbers.get("tokens")
    with _watched(watch) as mine:
        report = compare(cfg, rows=rows, tokens=tokens, watch=mine, traced=True)
    if _rank() == 0:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(report.table(colour), flush=True)
        if "json" in files:
            files["json"].write_text(as_json(report), encoding="utf-8")
        if "html" in files:
            files["html"].write_text(as_html(report), encoding="utf-8")
    return 0 if report.exact else 1


def teach(argv: list[str], watch: Watch | None = None) -> int:
    """`longfactory teach`: computes what a run's teacher or reference says of its data, and keeps
    it where the run will find it.
    """
    from longfactory.config import load_config

    cfg = load_config(argv)
    if (status := _start("teach", cfg, argv)) is not None:
        return status
    from longfactory.train.run import teach as compute

    with _watched(watch) as mine:
        compute(cfg, mine)
    return 0


def evaluate_long(argv: list[str], watch: Watch | None = None) -> int:
    """`longfactory eval`: prints a table and writes `long_context.json` and `.png`."""
    from longfactory.config import load_config

    words: list[str] = []
    given = {"lengths": "4096,16384", "depths": "0,0.25,0.5,0.75,1", "samples": "3"}
    given |= {"tasks": "needle,needles,chain,common", "documents": "", "report_dir": "."}
    for word in argv:
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key in given:
            given[key] = value
        else:
            words.append(word)
    lengths = _numbers("lengths", given["lengths"], int, 32, 10**8)
    depths = _numbers("depths", given["depths"], float, 0, 1)
    (samples,) = _numbers("samples", given["samples"], int, 1, 10**5)[:1]
    folder = Path(given["report_dir"])
    if _rank() == 0 and not folder.is_dir():
        raise UserError(f"report_dir: there is no folder {folder}.")
    nowhere = os.path.join(os.devnull, "longfactory-eval")
    cfg = load_config([*words, f"output_dir={nowhere}", "dataset=unused"])
    if (status := _start("eval", cfg, argv)) is not None:
        return status
    from longfactory.train.long_context import as_json, draw, evaluate, table
    from longfactory.train.long_context.measure import checked_tasks

    tasks = checked_tasks([t.strip() for t in given["tasks"].split(",") if t.strip()])
    documents = [d.strip() for d in given["documents"].split(",") if d.strip()]
    with _watched(watch) as mine:
        report = evaluate(
            cfg,
            lengths=lengths,
            depths=depths,
            tasks=tasks,
            samples=samples,
            documents=documents,
            watch=mine,
        )
    if _rank() == 0:
        print(table(report), flush=True)
        (folder / "long_context.json").write_text(as_json(report), encoding="utf-8")
        draw(report, folder / "long_context.png")
        print(f"Written: {folder / 'long_context.json'}, {folder / 'long_context.png'}")
    return 0


def _numbers(
    name: str, text: str, kind: Callable[[str], Any], low: float, high: float
) -> list[Any]:
    """Numbers with commas between them, each in a range."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high for number in found):
        raise UserError(
            f"{name}: got {text!r}, expected numbers from {low} to {high}, with commas."
        )
    return found


def plan(argv: list[str]) -> int:
    """`longfactory plan`. Returns the exit status."""
    from longfactory.plan.command import main as predict

    if any(word in ("-h", "--help", "help") for word in argv):
        print(ABOVE["plan"], flush=True)
        return predict(["--help"])
    return predict(argv)


def export(argv: list[str]) -> int:
    """`longfactory export`. Returns the exit status."""
    from longfactory.config import load_config

    cfg = load_config(argv, command="export")
    from longfactory.output.export import export as merge

    _set_up_log()
    print(f"The model is in {merge(cfg)}.")
    return 0


def expand(argv: list[str]) -> int:
    """`longfactory expand`: layers for `use_llama_pro`. Returns the exit status."""
    given = dict(word.removeprefix("--").partition("=")[::2] for word in argv)
    wanted = ("model_name_or_path", "export_dir", "num_expand")
    if set(given) != set(wanted) or not given["num_expand"].isdigit():
        got = " ".join(argv) or "nothing"
        raise UserError(
            f"expand: got {got}, expected model_name_or_path=FOLDER export_dir=FOLDER num_expand=N"
            " and no other key; N, the layers to add, divides the model's."
        )
    from longfactory.model.load import resolve
    from longfactory.output.expand import expand as grow

    _set_up_log()
    folder = Path(resolve(given["model_name_or_path"])[0])
    if not folder.is_dir():
        raise UserError(f"model_name_or_path: {folder} is not a folder. Download the model first.")
    layers = grow(folder, given["export_dir"], int(given["num_expand"]))
    print(f"A model of {layers} layers is in {given['export_dir']}.")
    return 0


def chat(argv: list[str]) -> int:
    """`longfactory chat`. Returns the exit status."""
    from longfactory.config import load_config

    cfg = load_config(argv, command="chat")
    from longfactory.output.chat import chat as talk

    talk(cfg)
    return 0


def api(argv: list[str]) -> int:
    """`longfactory api`. Returns the server's exit status."""
    from longfactory.config import load_config

    cfg = load_config(argv, command="api")
    from longfactory.output.serve import serve

    return serve(cfg)


def init(argv: list[str]) -> int:
    """`longfactory init`. Returns the exit status."""
    from longfactory.init import main as write

    return write(argv)


def schema(argv: list[str]) -> int:
    """`longfactory schema`. Returns the exit status."""
    import json

    from longfactory.config.schema import schema as make

    print(json.dumps(make(), indent=1))
    return 0


def completion(argv: list[str]) -> int:
    """`longfactory completion`. Returns the exit status."""
    from longfactory.config.completion import SHELLS, script
    from longfactory.init import STAGES

    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UserError(f"longfactory completion: name a shell: {', '.join(SHELLS)}.")
    print(script(argv[0], list(COMMANDS), [*STAGES, "examples"]), end="")
    return 0


def webui(argv: list[str]) -> int:
    """`longfactory webui`. Returns the exit status."""
    from longfactory.webui.command import main as serve

    return serve(argv)


def env(argv: list[str]) -> int:
    """`longfactory env`. Returns the exit status."""
    from longfactory.output.environment import report

    print(report())
    return 0


def version(argv: list[str]) -> int:
    """`longfactory version`. Returns the exit status."""
    print(__version__)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "init": init,
    "train": train,
    "plan": plan,
    "verify": verify,
    "teach": teach,
    "eval": evaluate_long,
    "export": export,
    "expand": expand,
    "chat": chat,
    "api": api,
    "webui": webui,
    "env": env,
    "schema": schema,
    "completion": completion,
    "version": version,
}
READS_KEYS = ("train", "verify", "teach", "eval", "export", "chat", "api")
WATCHED = ("train", "verify", "teach", "eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 where the user can put something right,
    another where the program failed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    terminal.slow_bars()
    if not words or words[0] in ("help", "-h", "--help"):
        print(USAGE.format(version=__version__), end="")
        return 0
    if words[0] in ("-v", "--version"):
        words[0] = "version"
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        from longfactory.config.stage_facts import STAGES

        as_stage = f" To train this stage: longfactory train ... stage={command}."
        print(
            f"longfactory has no command {command!r}. It has {', '.join(COMMANDS)}."
            + (as_stage if command in STAGES else ""),
            file=sys.stderr,
        )
        return launch.USER_ERROR
    own_help = command in ("plan", "init", "webui")
    if rest and rest[0] in ("-h", "--help", "help") and not own_help:
        if command in READS_KEYS:
            from longfactory.config.help import help_text

            print(
                ("" if len(rest) > 1 else ABOVE.get(command, ""))
                + help_text(rest[1] if len(rest) > 1 else None),
                end="",
            )
        else:
            print(USAGE.format(version=__version__), end="")
        return 0
    more: dict[str, Any] = {}
    if launch.is_worker():
        die_with_parent()
        if command in WATCHED:
            more["watch"] = begin()
    watch: Watch | None = more.get("watch")
    try:
        return COMMANDS[command](rest, **more)
    except Stopped as stopped:
        if _rank() == 0 and launched.claim_the_word():
            why = watch.stop if watch is not None else None
            said = str(stopped) or stopped_before_training(why)
            terminal.close_bars()
            print(f"longfactory: {said}", file=sys.stderr, flush=True)
            if not launch.number("NNODES", 1) > 1:
                print(f"  longfactory {command_line(words)}", file=sys.stderr, flush=True)
        if watch is not None:
            watch.all_left()
        return STOPPED
    except UserError as e:
        if launch.is_on("LONGFACTORY_DEBUG"):
            raise
        _tell(str(e))
        return launch.USER_ERROR
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is left to say, and Python must not complain
        # while closing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        sentence = None if launch.is_on("LONGFACTORY_DEBUG") else disk_sentence(e)
        if sentence is None:
            raise
        _tell(sentence)
        return launch.USER_ERROR
    finally:
        if watch is not None:
            watch.close()


def _rank() -> int:
    return launch.number("RANK", 0) if launch.is_worker() else 0


def command_line(words: Sequence[str]) -> str:
    """The words of a command as they can be typed again, without the values of secrets."""
    from longfactory.config.fields import is_secret

    shown: list[str] = []
    hides = False
    for word in words:
        name, sign, _ = word.partition("=")
        secret = is_secret(name.lstrip("-"))
        if hides:
            shown.append("...")
        elif secret and sign:
            shown.append(f"{name}=...")
        else:
            shown.append(shlex.quote(word))
        hides = secret and not sign and word.startswith("--")
    return " ".join(shown)


def _tell(message: str) -> None:
    """Prints an error once for the whole run: the first process speaks, and another only where the
    first has stayed silent.
    """
    if _rank() != 0:
        # When the first process fails too, it speaks during the wait, or the launcher ends this
        # one.
        time.sleep(3)
        message = f"Process {_rank()}: {message}"
    if launched.claim_the_word():
        terminal.close_bars()
        print(f"longfactory: {message}", file=sys.stderr, flush=True)


def run() -> NoReturn:
    """`main` as a process. A worker that fails leaves at once: closing down could wait for
    processes that wait for it.
    """
    try:
        status = main()
    except Exception as error:
        if not launch.is_worker():
            raise
        # Where another process has ended, this one's collective fails too, and says less of why.
        # The launcher is about to end it.
        launched.wait_for_siblings(3.0)
        status = 1
        if lost_connection(error) and not launch.is_on("LONGFACTORY_DEBUG"):
            status = PEER_LOST
            if launched.claim_the_word():
                print(
                    f"longfactory: Process {_rank()} lost the connection to another one, which has"
                    f" ended, or its machine: {launch.first_line(error)}",
                    file=sys.stderr,
                    flush=True,
                )
        else:
            traceback.print_exc()
    if status and launch.is_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        if status == STOPPED and launched.write_status(STOPPED):
            status = 0  # torchrun would take another one for a failure, and start again
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
