"""Stage `audit`: say what questions, corpus and index are worth before a model runs, and stop where they are
broken."""

from dgpo_core.agent.prompts import encode_prompt, encode_text, information
from dgpo_core.config.params import Params, load_params
from dgpo_core.config.recipes import STUDENT
from dgpo_core.datasets.audit import Audit, CorpusAudit, Probes, Room, Splits, beyond
from dgpo_core.datasets.audit import audit as audit_splits
from dgpo_core.datasets.records import Passage, read_jsonl, read_questions
from dgpo_core.errors import UserError
from dgpo_core.models import load_tokenizer
from dgpo_core.reporting.data_page import markdown, render
from dgpo_core.retrieval.shards import read_manifest
from tasks.project.paths import (
    AUDIT_PAGE,
    AUDIT_PASSED,
    AUDIT_SUMMARY,
    CORPUS,
    INDEX,
    QUESTIONS,
    questions_file,
)
from tasks.stages.inputs import local, model_source, retriever
from tasks.stages.outputs import write_metrics
from tasks.stages.stage import Run, stage, stage_main

REPORT_EVERY = 20_000  # passages


def audit() -> None:
    """Write the data report. Raise UserError for figures beyond the limits, naming where the page is then."""
    params = load_params()
    source = model_source(params, STUDENT)
    config = params.sections("audit", "questions", "protocol", "retrieval") | {"model": source}
    inputs, outputs = [CORPUS, INDEX, QUESTIONS, *local(source)], [AUDIT_PAGE, AUDIT_SUMMARY, AUDIT_PASSED]
    with stage("audit", config=config, inputs=inputs, outputs=outputs) as run:
        found = examine(params, run)
        for remark in found.remarks:
            print(remark, flush=True)
        if stops := beyond(found, params.audit):
            page = run.state / AUDIT_PAGE.name  # outputs appear only where a stage succeeds
            page.write_text(render(found, stops), encoding="utf-8")
            raise UserError(f"{'; '.join(stops)}; all figures: {page}")
        run.output(AUDIT_PAGE).parent.mkdir(parents=True, exist_ok=True)
        run.output(AUDIT_PAGE).write_text(render(found, stops), encoding="utf-8")
        run.output(AUDIT_SUMMARY).write_text(markdown(found, stops), encoding="utf-8")
        run.output(AUDIT_PASSED).write_text("The data are within the limits of the section audit.\n")
        sizes = {"passages": found.passages, "average_words": found.average_words}
        write_metrics(run, sizes | found.metrics)


def examine(params: Params, run: Run) -> Audit:
    """Read the corpus once, and search for some questions of each split that is used."""
    questions = used_questions(params)
    corpus, expected = CorpusAudit(questions), read_manifest(INDEX).passages
    for number, passage in enumerate(read_jsonl(CORPUS, Passage.from_json), 1):
        corpus.read(passage)
        if number % REPORT_EVERY == 0:
            run.progress(number, max(number, expected), unit="passages")
    protocol, index = params.protocol, retriever(params)
    tokenizer = load_tokenizer(model_source(params, STUDENT))

    def search(queries: list[str]) -> list[list[Passage]]:
        return [[hit.passage for hit in hits] for hits in index.search(queries, params.retrieval.top_k)]

    def prompt_tokens(question: str) -> int:
        return len(encode_prompt(question, protocol.instruction, tokenizer))

    def shown_tokens(passages: list[Passage]) -> int:
        block = information([(passage.title, passage.text) for passage in passages], protocol.documents)
        return len(encode_text(block, tokenizer))

    frame = shown_tokens([])
    room = Room(protocol.max_context - protocol.max_new_tokens, protocol.max_information + frame)
    probes = Probes(search, prompt_tokens, shown_tokens)
    found = audit_splits(questions, corpus, probes, room, params.audit.searched)
    run.progress(corpus.passages, corpus.passages, unit="passages")
    return found


def used_questions(params: Params) -> Splits:
    """Read the splits that are trained, validated or tested on."""
    keys = [(name, split) for name in params.questions.train for split in ("train", "dev")]
    keys += [(name, "test") for name in params.questions.test]
    return {key: read_questions(questions_file(*key)) for key in keys}


if __name__ == "__main__":
    stage_main("audit", audit)
