"""Agent loops as the field's projects write them, over our model, prompts and retriever.

They follow the structure of the named releases, not their code; episodes a second are compared with ours in
`benchmarks.peer_rollouts`.
"""

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.agent import prompts
from dgpo_core.agent.actions import ActionKind, parse_action
from dgpo_core.config.agent import ProtocolConfig, Sampling
from dgpo_core.retrieval.ranking import Retriever


@dataclass
class BatchLoop:
    """Search-R1's loop (`search_r1/llm_agent/generation.py`), with transformers' `generate` as its engine.

    A turn of the whole batch is generated to its limit, decoded, cut after the first closing tag, tokenised
    again, answered, and joined to histories that are padded anew; the next turn reads them from the start.
    With `stops`, generation of a row ends at the closing tag, as a kinder engine would.
    """

    model: PreTrainedModel
    tokenizer: Any
    retriever: Retriever
    config: ProtocolConfig
    top_k: int
    stops: bool = False

    def run(self, questions: list[str], sampling: Sampling) -> list[str]:
        """Return each question's episode as text."""
        texts = [
            prompts.prompt_text(question, self.config.instruction, self.tokenizer) for question in questions
        ]
        histories = [self._encode(text) for text in texts]
        active = list(range(len(questions)))
        for turn in range(self.config.max_turns + 1):
            if not active:
                break
            written = self._generate([histories[i] for i in active], sampling)
            actions = [parse_action(text) for text in written]
            queries = [action.content or "" for action in actions if action.kind is ActionKind.SEARCH]
            found = iter(self.retriever.search(queries, self.top_k)) if queries else iter(())
            going = []
            for i, text, action in zip(active, written, actions, strict=True):
                histories[i] = histories[i] + self._encode(text)
                if action.kind is ActionKind.ANSWER:
                    continue
                shown = prompts.INVALID_ACTION
                if action.kind is ActionKind.SEARCH:
                    hits = [(hit.passage.title, hit.passage.text) for hit in next(found)]
                    shown = prompts.information(hits)
                if turn < self.config.max_turns:
                    histories[i] = (histories[i] + self._encode(shown))[: self.config.max_context]
                    going.append(i)
            active = [i for i in going if len(histories[i]) < self.config.max_context]
        return [self.tokenizer.decode(ids) for ids in histories]

    @torch.inference_mode()
    def _generate(self, histories: list[list[int]], sampling: Sampling) -> list[str]:
        width = max(map(len, histories))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(h)) + h for h in histories])
        mask = torch.tensor([[0] * (width - len(h)) + [1] * len(h) for h in histories])
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        if self.stops:
            options |= {
                "stop_strings": [prompts.SEARCH_END, prompts.ANSWER_END],
                "tokenizer": self.tokenizer,
            }
        generate: Any = self.model.generate
        answers = generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.config.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id, **options,
        )  # fmt: skip
        return [
            self._cut(text)
            for text in self.tokenizer.batch_decode(answers[:, width:], skip_special_tokens=True)
        ]

    @staticmethod
    def _cut(text: str) -> str:
        """Cut after the first closing tag of an action."""
        ends = [text.find(tag) + len(tag) for tag in (prompts.SEARCH_END, prompts.ANSWER_END) if tag in text]
        return text[: min(ends)] if ends else text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


class TrlLoop:
    """TRL's GRPOTrainer with a search tool: its own generation and tool loop, without the training.

    Its tokenizer gets a template that renders our episodes and a parser of our tags; the closing tags, one
    token each, end a turn as an end-of-turn token does for the models that TRL's users train.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        retriever: Retriever,
        config: ProtocolConfig,
        top_k: int,
        temperature: float,
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self._config = config
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.chat_template = TEMPLATE
        self.tokenizer.eos_token = prompts.SEARCH_END
        self.tokenizer.response_template = {}
        self.tokenizer.parse_response = self._parsed
        model.generation_config.eos_token_id = [
            tokenizer.encode(tag, add_special_tokens=False)[-1]
            for tag in (prompts.SEARCH_END, prompts.ANSWER_END)
        ] + [tokenizer.eos_token_id]

        def search(query: str) -> str:
            """Search.

            Args:
                query: What to search for.
            """
            hits = retriever.search([query], top_k)[0]
            shown = (prompts.document(i, h.passage.title, h.passage.text) for i, h in enumerate(hits, 1))
            return "".join(shown)

        self._tools = {"search": search}
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], temperature=temperature,
            per_device_train_batch_size=2, num_generations=2, max_completion_length=config.max_context,
            max_tool_calling_iterations=config.max_turns,
            generation_kwargs={"max_new_tokens": config.max_new_tokens},
        )  # fmt: skip
        self._trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}] * 2),
            processing_class=self.tokenizer,
            tools=[search],
        )

    def run(self, questions: list[str]) -> list[str]:
        """Return each question's episode as text."""
        instruction = self._config.instruction
        asked = [[{"role": "user", "content": prompts.message_text(q, instruction)}] for q in questions]
        self._trainer._sync_tool_dicts = [self._tools] * len(asked)
        self._trainer._async_tool_dicts = [{}] * len(asked)
        prompt_ids, completion_ids, *_ = self._trainer._generate(asked)
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return [self.tokenizer.decode(prompt + completion) for prompt, completion in pairs]

    def _parsed(self, ids: list[int], prefix: object = None, tools: object = None) -> dict[str, Any]:
        text = self.tokenizer.decode(ids)
        action = parse_action(text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if action.kind is ActionKind.SEARCH:
            function = {"name": "search", "arguments": {"query": action.content}}
            message |= {"tool_calls": [{"type": "function", "function": function}]}
        return message


TEMPLATE = """\
{%- for message in messages -%}
{%- set text = message['content'] -%}
{%- if message['role'] == 'user' -%}<|im_start|>user
{{ text }}<|im_end|>
{%- elif message['role'] == 'assistant' -%}{{ '\\n<|im_start|>assistant\\n' + text }}
{%- for call in message['tool_calls'] or [] -%}
<search>{{ call['function']['name'] }} {{ call['function']['arguments'] }}</search>
{%- endfor -%}
{%- else -%}{{ '\\n\\n<information>' + text + '</information>\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] == 'user' -%}
{{ '\\n<|im_start|>assistant\\n' }}
{%- endif -%}
"""
