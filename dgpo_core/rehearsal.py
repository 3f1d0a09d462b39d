"""A profile made small: the same stages, families and formats, in minutes on any machine.

Three parts: settings laid over a profile, a handful of passages and questions in the published formats
(docs/data.md), and stand-ins for the published models: their true architecture scaled down with random
weights, and tokenizers that behave as Qwen2's and Llama 3's do.
"""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer, Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from dgpo_core.agent import prompts
from dgpo_core.config.params import overlay
from dgpo_core.datasets.published import TEST_SPLITS
from dgpo_core.datasets.records import Passage, Question, write_jsonl
from dgpo_core.models import load_tokenizer, save_model
from dgpo_core.objectives.logprobs import token_logprobs
from dgpo_core.planning.shapes import config_of, published
from dgpo_core.training.batches import TokenSequence, backbone_of, collate, counted_hidden, head_of

# What is small in a rehearsal; everything else is the profile's.
SMALL: dict[str, dict[str, Any]] = {
    "models": {"student": "models/student", "teacher": "models/teacher"},
    "protocol": {"max_turns": 2, "max_new_tokens": 24, "max_information": 96, "max_context": 1024},
    "rollout": {"batch_tokens": 8192},
    "compute": {"micro_batch_tokens": 2048},
    "data": {
        "published": {
            "questions": "published/questions",
            "corpus": "published/corpus.jsonl",
            "musique": ["published/musique.jsonl"],
            "nq": ["published/nq.jsonl"],
            "dev_questions": 4,
            "check_counts": False,
            "limits": {},
        }
    },
    "retrieval": {"vectors": []},
    "teach": {"questions": 2, "chunk": 4},
    "distributions": {"sample": 2},
    "distill": {
        "epochs": 1,
        "batch_size": 2,
        "dev_questions": 2,
        "min_em": 0.0,
        "on_policy": {"steps": 1, "batch_size": 2, "dev_every": 1},
        "distillm": {"validation": 1},
    },
    "reinforce": {
        "steps": 1,
        "batch_size": 4,
        "mini_batch_size": 2,
        "group_size": 2,
        "audit_episodes": 1,
        "dev_every": 1,
        "dev_questions": 2,
        "checkpoint_every": 1,
    },
    "audit": {"max_in_train": 1.0},  # its few questions are much alike
    "evaluate": {"questions": 2, "chunk": 16, "trace_episodes": 1},
    "report": {"first": {}},
    "promote": {"log_weights": False},
}
# engine -> (module that it needs, what stands in for it)
ENGINES = {
    "rollout": {"vllm": ("vllm", "transformers"), "vllm-server": ("vllm", "transformers")},
    "compute": {"deepspeed": ("deepspeed", "torch")},
}

# settings of an engine that do not go with the one that stands in for it
WITHOUT: dict[str, dict[str, Any]] = {
    "deepspeed": {"zero_stage": None, "offload": False, "split_teacher": False}
}


def scaled_down(resolved: dict[str, Any], cuda: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters of a rehearsal, and notes on what stands in for what this machine lacks.

    `resolved` is a params.yaml's content; `cuda` whether a GPU can be used.
    """
    params, notes = overlay(resolved, SMALL), []
    if params["compute"]["device"] != "cpu" and not cuda:
        params["compute"]["device"] = "cpu"
        notes.append("no GPU: everything runs on the processor")
    notes += _local_retrieval(params["retrieval"])
    for section, engines in ENGINES.items():
        asked = params[section].get("engine")
        module, other = engines.get(asked, (None, None))
        if module and (find_spec(module) is None or asked == "vllm-server"):
            params[section] |= {"engine": other, **WITHOUT.get(asked, {})}
            notes.append(f"{section}.engine {asked}: not here, {other} stands in")
    return params, notes


def _local_retrieval(retrieval: dict[str, Any]) -> list[str]:
    """Ask nothing of the hub or of servers, and touch nobody's collection. Return notes on what stands in."""
    notes, encoder, location = [], retrieval["encoder"], retrieval["location"]
    if encoder["kind"] != "bm25":
        if encoder["kind"] == "sentence-transformers":
            notes.append(f"encoder {encoder['model']}: a random one of E5's kind stands in")
        encoder |= {"kind": "dense", "model": "models/encoder", "revision": None}
    if location not in ("embedded", "memory"):
        notes.append(f"the index at {location}: the embedded engine stands in")
        retrieval["location"] = "embedded"
    return notes


ANSWER = "yes"  # of every question: what the rehearsal's teacher has learned by heart
QUERY = "harbour towns"
# What the teacher says: a search, and after the information an answer.
TURNS = (f"<search> {QUERY} </search>", f"<answer> {ANSWER} </answer>")
PLACES = ("Aldmoor", "Brenwick", "Carrow", "Dunhaven", "Elmsea", "Farholt", "Grayport", "Hythe Bay")
SPLITS = {"train": 8, "dev": 4, "test": 4}


def passages() -> list[Passage]:
    """Return a passage for each place."""
    return [
        Passage(
            str(number),
            place,
            f"{place} is a harbour town. Its lighthouse was built in {1840 + 7 * number}, yes.",
        )
        for number, place in enumerate(PLACES)
    ]


def questions(dataset: str, split: str) -> list[Question]:
    """Return questions with the metadata that ARCap looks for: golden passages and a long answer."""
    found = passages()
    written = []
    for number in range(SPLITS[split]):
        passage = found[(number + len(dataset)) % len(found)]
        metadata = {
            "golden_passages": [{"id": passage.id, "title": passage.title, "text": passage.text}],
            "long_answer": passage.text,
        }
        text = f"Is {passage.title} a harbour town with a lighthouse ({split} {number})"
        written.append(Question(f"{split}_{number}", text, (ANSWER,), metadata))
    return written


def write_question_sets(folder: Path, datasets: Iterable[str]) -> None:
    """Write `folder`/<set>/<split>.jsonl, as the stage `data` leaves them."""
    for dataset in datasets:
        for split in SPLITS:
            write_jsonl(folder / dataset / f"{split}.jsonl", questions(dataset, split))


def write_published(folder: Path, train: Iterable[str], test: Iterable[str]) -> None:
    """Write what the stage `data` reads: FlashRAG's question sets, wiki-18, MuSiQue's and NQ's own files."""
    write_jsonl(folder / "corpus.jsonl", passages())
    for dataset in train:
        write_jsonl(folder / "questions" / dataset / "train.jsonl", questions(dataset, "train"))
    for dataset in test:
        file = folder / "questions" / dataset / f"{TEST_SPLITS[dataset]}.jsonl"
        write_jsonl(file, questions(dataset, "test"))
    _write_rows(folder / "musique.jsonl", map(_of_musique, questions("musique", "test")))
    _write_rows(folder / "nq.jsonl", map(_of_nq, questions("nq", "test")))


def _of_musique(question: Question) -> dict[str, Any]:
    (passage,) = question.metadata["golden_passages"]
    paragraph = {"title": passage["title"], "paragraph_text": passage["text"], "is_supporting": True}
    return {
        "question": question.question,
        "paragraphs": [paragraph],
        "answer": ANSWER,
        "answer_aliases": [],
    }


def _of_nq(question: Question) -> dict[str, Any]:
    """Return NQ's simplified form: the page's words, of which the last one is the short answer."""
    (passage,) = question.metadata["golden_passages"]
    words = passage["text"].split(" ")
    span = {"start_token": 0, "end_token": len(words)}
    short = {"start_token": len(words) - 1, "end_token": len(words)}
    annotation = {"long_answer": span, "short_answers": [short], "yes_no_answer": "NONE"}
    return {
        "question_text": question.question,
        "document_text": passage["text"],
        "annotations": [annotation],
    }


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


SIZE = 600  # of the vocabulary that is learned
# Both families split words, runs of other characters and line breaks before merging (their tokenizer.json).
SPLIT = r"'[a-z]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
# Without a system message Qwen2.5 puts in a line of its own, and Llama 3 a block with dates.
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(family: str, texts: list[str]) -> Any:
    """Learn a tokenizer from `texts` and the protocol's own, the same on every machine.

    `family` is qwen2 or llama: byte-level BPE with its chat template and its special tokens.
    """
    special = QWEN_SPECIAL if family == "qwen2" else LLAMA_SPECIAL
    learned = _learn([*texts, *prompts.INSTRUCTIONS.values(), prompts.INVALID_ACTION, *prompts.TAGS])
    vocabulary, merges = learned["vocab"], [tuple(pair) for pair in learned["merges"]]
    if family == "qwen2":
        tokenizer: Any = Qwen2Tokenizer(
            vocab=vocabulary,
            merges=merges,  # type: ignore[arg-type]
            unk_token=special[0],
            pad_token=special[0],
            eos_token=special[2],
        )
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = QWEN_TEMPLATE
        return tokenizer
    backend = _backend(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[4], pad_token=special[1]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def _backend(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevelDecoder()
    return backend


def _learn(texts: list[str]) -> dict[str, Any]:
    """Learn vocabulary and merges."""
    backend = _backend(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    learned: dict[str, Any] = json.loads(backend.to_str())["model"]
    return learned


HEAD_SIZE = 32  # the least that vLLM runs on a processor
LAYERS = 2
LEARNED = 0.02  # nats a token below which an episode is known by heart
PATIENCE = 400  # steps


def scaled_config(source: str, tokens: int) -> dict[str, Any]:
    """Return config.json's content of `source` with few layers and a small width, for `tokens` tokens.

    Family, grouped queries, tied or untied embeddings and padding rows are those of `source`.
    """
    config = config_of(source)
    heads = config["num_attention_heads"]
    ratio = heads // config.get("num_key_value_heads", heads)  # queries that share keys and values
    groups = 2 if ratio <= 4 else 1
    hidden = ratio * groups * HEAD_SIZE
    return {
        "model_type": config["model_type"],
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": ratio * groups,
        "num_key_value_heads": groups,
        "vocab_size": tokens + padding_rows(source, config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def padding_rows(source: str, config: dict[str, Any]) -> int:
    """Return how many rows of the embedding no token has."""
    entry = published(source)
    known = entry["tokens"] if entry else len(load_tokenizer(source))
    return max(0, int(config["vocab_size"]) - known)


def random_model(source: str, tokenizer: Any, seed: int) -> PreTrainedModel:
    """Build the scaled-down model of `source` with random weights in float32."""
    values = scaled_config(source, len(tokenizer))
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        dtype="float32",
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def episodes(tokenizer: Any, params: dict[str, Any]) -> list[TokenSequence]:
    """Return four episodes that the teacher is to know, each with other passages."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    protocol, sequences = params["protocol"], []
    for number, question in enumerate(questions("nq", "train")[:4]):
        found = passages()[number : number + params["retrieval"]["top_k"]]
        documents = "".join(
            prompts.document(rank, passage.title, passage.text, protocol["documents"])
            for rank, passage in enumerate(found, 1)
        )
        search, answer = (encode(turn) for turn in TURNS)
        ids = encode(prompts.prompt_text(question.question, protocol["instruction"], tokenizer))
        own = list(range(len(ids), len(ids) + len(search)))
        ids += search + encode(prompts.INFORMATION_PREFIX)
        ids += encode(documents)[: protocol["max_information"]] + encode(prompts.INFORMATION_SUFFIX)
        own += range(len(ids), len(ids) + len(answer))
        sequences.append(TokenSequence(ids + answer, own))
    return sequences


def learn_by_heart(model: PreTrainedModel, sequences: list[TokenSequence]) -> float:
    """Train until `sequences` are known, and return the last loss in nats a token.

    So the teacher's answers are right, and the stages behind it have something to do.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loss = torch.tensor(float("inf"))
    model.train()
    for step in range(PATIENCE):
        batch = collate([sequences[step % len(sequences)]], model.device)
        hidden = counted_hidden(backbone_of(model), batch)
        loss = -token_logprobs(hidden, head_of(model), batch.targets)[0]
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if float(loss.max().detach()) < LEARNED:
            break
    model.eval()
    return float(loss.mean().detach())


def save_encoder(texts: list[str], folder: Path) -> None:
    """Save a random BERT with a word-piece tokenizer: E5's architecture."""
    learned = BertWordPieceTokenizer()
    learned.train_from_iterator(texts, vocab_size=500, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=128,
    )
    save_model(BertModel(config), tokenizer, folder)
