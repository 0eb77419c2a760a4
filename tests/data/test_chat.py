"""Which tokens of a conversation are learned, whatever its chat template does."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from peftjax.core.errors import UserError
from peftjax.data.chat import _common
from peftjax.data.records import encode_prompt, encode_record
from peftjax.data.tokenizer import Tokenizer, load_tokenizer

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes no"},
    {"role": "user", "content": "the date"},
    {"role": "assistant", "content": "17 March"},
]
# As Qwen3: reasoning is written for answers after the last question only.
REWRITES = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.index0 > ns.last %}<think>{{ '\n' + m.content.split('</think>')[0].split('<think>')[1] if '</think>' in "
    "m.content else '\n\n' }}</think>{{ '\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
# As DeepSeek-R1: the generation prompt begins the reasoning, which no answer has in the end.
OPENS = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}</s>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{{ '\n' }}{% endif %}"
)
# As Qwen3.5: the same, and the last answer has its reasoning.
OPENS_THE_LAST = REWRITES.replace("<|assistant|>{{ '\n' }}", "<|assistant|>{{ '\n' }}<think>{{ '\n' }}")
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.content is defined %}"
    "{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)

ECHOES = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|>{{ ns.name }} to=assistant:{{ m.content }}<|end|>{% elif m.tool_calls %}"
    "{% set ns.name = m.tool_calls[0].function.name %}<|assistant|>{{ m.content if loop.last }}to={{ ns.name }} "
    "{{ m.tool_calls[0].function.arguments | tojson }}<|end|>{% else %}<|{{ m.role }}|>{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ECHOES = "{% set ns = namespace(name='') %}" + ECHOES
VARIES_MARKED = MARKED.replace("{{ m.content }}{% endg", "{{ 'please ' if polite }}{{ m.content }}{% endg")
VARIES = VARIES_MARKED.replace("{% generation %}", "<|assistant|>").replace("{% endgeneration %}", "")
VARIES += "{% if add_generation_prompt %}<|assistant|>{% endif %}"

Make = Callable[..., Any]


@pytest.fixture
def learned(tokenizer: Tokenizer, make_config: Make) -> Callable[..., str]:
    """What is learned of a record, with the conftest's template or another one."""
    tokenizers = {"": tokenizer}

    def learned(record: Any, template: str = "", **fields: Any) -> str:
        if template not in tokenizers:
            (tokenizer.directory / "chat_template.jinja").write_text(template)
            tokenizers[template] = load_tokenizer(tokenizer.directory)
        record = record if isinstance(record, dict) else {"messages": record}
        data = make_config(**{"format": "chat"} | fields).data
        example = encode_record(record, data, tokenizers[template], name="a:1")
        ids = example.tokens[example.loss_mask].tolist()
        return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)

    return learned


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        (REWRITES, "yes no<|end|>", "<think>\n\n</think>\n\n17 March<|end|>"),
        (OPENS, "yes no</s>", "17 March</s>"),
        (OPENS_THE_LAST, "yes no<|end|>", "\n</think>\n\n17 March<|end|>"),
    ],
)
def test_an_answer_is_learned_where_it_stands_in_the_whole_text(
    template: str, first: str, last: str, learned: Callable[..., str]
) -> None:
    assert learned(CHAT, template) == first + last
    assert learned(CHAT, template, train_on="last") == last
    assert learned(CHAT[1:], template) == first + last  # the assistant speaks first
    reasoned = [dict(message) for message in CHAT]
    for message in reasoned[1::2]:
        message["content"] = "<think>because</think>" + message["content"]
    assert learned(reasoned, template) == first + last.replace("\n</think>", "because</think>")


def test_all_completions_or_the_last_one_carry_a_loss_and_weight_0_never(learned: Callable[..., str]) -> None:
    muted = [message | ({"weight": 0} if i == 1 else {}) for i, message in enumerate(CHAT)]
    for messages, train_on, expected in (
        (CHAT, "last", "17 March<|end|>"),
        (muted, "completions", "17 March<|end|>"),
        (CHAT, "completions", "yes no<|end|>17 March<|end|>"),
    ):
        assert learned(messages, train_on=train_on) == expected
        assert learned(messages, MARKED, train_on=train_on) == expected.replace("<|end|>", "")
    whole = "<s><|user|>\nhello<|end|>\n<|assistant|>\nyes no<|end|>\n<|user|>\nthe date<|end|>\n<|assistant|>\n17 March<|end|>\n"
    assert learned(CHAT, train_on="all") == whole
    assert learned(muted, train_on="all") == whole.replace("yes no<|end|>", "")
    assert learned({"prompt": "a", "completion": "b"}, format="completion", train_on="all") == "<s>ab</s>"
    with pytest.raises(UserError, match=r"^a:1: the weight of a message must be 0 or 1, not 0\.5"):
        learned([CHAT[0], CHAT[1] | {"weight": 0.5}])


def test_a_prompt_and_a_completion_may_be_lists_of_messages(
    learned: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    """As in TRL: only the completion is learned, not earlier answers in the prompt."""
    record = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert learned(record) == learned(CHAT, train_on="last") == "17 March<|end|>"
    assert learned(record, train_on="all") == learned(CHAT, train_on="all")
    renamed = {"context": CHAT[:1], "chosen": CHAT[1:]}
    assert learned(renamed, prompt_field="context", completion_field="chosen") == learned(CHAT)
    assert learned({"prompt": [], "messages": CHAT}) == learned(record | {"messages": CHAT}) == learned(CHAT)
    prompts = [
        encode_prompt(each, make_config(format="chat").data, tokenizer, name="a:1")
        for each in (record, {"messages": CHAT})
    ]
    assert prompts[0].tokens == prompts[1].tokens
    assert prompts[0].expected == "17 March"
    with pytest.raises(UserError, match=r"a:1: the record has no field 'messages'"):
        learned(record | {"completion": "17 March"})
    with pytest.raises(
        UserError,
        match=r"'prompt' must hold text .*, not list; for lists of messages set data.format=\"chat\"",
    ):
        learned(record, format="completion")


def test_tools_reach_the_template_and_a_call_needs_no_content(learned: Callable[..., str]) -> None:
    """Arrow gives every struct the keys of all others, with null for a value."""
    tools = [{"type": "function", "function": {"name": "date", "description": None}}]
    call = {"type": "function", "function": {"name": "date", "arguments": {"of": "today", "at": None}}}
    messages = [
        {"role": "user", "content": "the date", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "17 March", "tool_calls": None},
        {"role": "assistant", "content": "17 March", "tool_calls": None},
    ]
    record = {"messages": messages, "tools": tools}
    written = '<call>{"name": "date", "arguments": {"of": "today"}}</call><|end|>'
    assert learned(record, TOOLS) == written + "17 March<|end|>"
    stored = '[{"type": "function", "function": {"name": "date"}}]'
    for given in (tools, stored):
        whole = learned({"messages": messages, "tools": given}, TOOLS, train_on="all")
        assert (
            whole
            == f"{stored}<|user|>the date<|end|><|assistant|>{written}<|tool|>17 March<|end|><|assistant|>17 March<|end|>"
        )
    assert learned({"messages": messages, "tools": []}, TOOLS, train_on="all").startswith("<|user|>")
    later = TOOLS.replace("{{ m.content }}", "{{ m.content }}{{ '!' if loop.last }}")  # located, not found as a prefix
    assert learned(record, later) == written + "17 March!<|end|>"
    with pytest.warns(UserWarning, match="does not use the tools of the records"):
        assert learned({"messages": CHAT, "tools": tools}) == "yes no<|end|>17 March<|end|>"
    for bad in ("[", '{"a": 1}', 3):
        with pytest.raises(UserError, match=r"^a:1: field 'tools' "):
            learned({"messages": messages, "tools": bad}, TOOLS)
    text = {"type": "function", "function": {"name": "date", "arguments": '{"of": "é"}'}}
    with pytest.warns(
        UserWarning, match=r"arguments as JSON text, .* would encode as JSON a second time; convert them to objects"
    ):
        learned({"messages": [messages[0], messages[1] | {"tool_calls": [text]}]}, TOOLS)
    as_it_is = TOOLS.replace("call.function | tojson", "call.function.arguments")  # no warning, which would be an error
    assert (
        learned({"messages": [messages[0], messages[1] | {"tool_calls": [text]}]}, as_it_is)
        == '<call>{"of": "é"}</call><|end|>'
    )
    with pytest.raises(UserError, match=r"^a:1: the chat template of .* does not render tool calls"):
        learned(record, TOOLS.replace("tool_calls", "calls"))
    with pytest.raises(UserError, match="a:1: a message with the role 'assistant' has neither content nor tool_calls"):
        learned([CHAT[0], {"role": "assistant", "content": None}])


def test_the_header_of_a_tool_is_not_learned_if_it_has_the_name_of_the_call(
    learned: Callable[..., str], tokenizer: Tokenizer
) -> None:
    """As in gpt-oss. Its reasoning before a call is only written while there is no answer, so no part is a prefix."""
    (tokenizer.directory / "generation_config.json").write_text('{"eos_token_id": [2, 6]}')
    call = {"type": "function", "function": {"name": "date", "arguments": {"of": "today"}}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "yes", "tool_calls": [call]},
        {"role": "tool", "content": "17 March"},
        CHAT[3],
    ]
    assert learned({"messages": messages}, ECHOES) == 'to=date {"of": "today"}<|end|>17 March</s>'


def test_variables_of_the_template_are_in_the_record(learned: Callable[..., str]) -> None:
    """As the column of TRL, for example {"enable_thinking": false} for Qwen3."""
    for template, end in ((VARIES, "<|end|>"), (VARIES_MARKED, "")):
        plain = learned({"messages": CHAT, "chat_template_kwargs": None}, template)
        assert plain == f"yes no{end}17 March{end}"
        polite = {"messages": CHAT, "chat_template_kwargs": {"polite": True, "end": None}}
        assert learned(polite, template) == f"please yes no{end}please 17 March{end}"
    for wrong, message in (
        ([1], "must hold an object"),
        ({"tokenize": True}, "'tokenize' is not a variable of a template"),
    ):
        with pytest.raises(UserError, match=f"^a:1: .*chat_template_kwargs.*{message}"):
            learned({"messages": CHAT, "chat_template_kwargs": wrong})


def test_parts_of_content_are_rendered_or_joined(learned: Callable[..., str]) -> None:
    parts = [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": t} for t in ("yes", " no")]}]
    reads = (
        "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}[{{ p.text }}]{% endfor %}<|end|>{% endfor %}"
    )
    assert learned(parts) == "yes no<|end|>"
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    assert learned([question, parts[1]], reads, train_on="all") == "<|user|>[?]<|end|><|assistant|>[yes][ no]<|end|>"
    assert learned(CHAT[:2], reads) == "<|assistant|>[yes no]<|end|>"  # of text, this template writes nothing
    parts[0] = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(
        UserError, match="a:1: a message with the role 'user' has a part of type 'image'; only text is supported"
    ):
        learned(parts)


def test_sharegpt_and_alpaca_are_named_as_formats(
    learned: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    turns = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in CHAT]
    both = {"format": "sharegpt", "train_on": "all"}
    assert learned({"conversations": turns}, **both) == learned(CHAT, train_on="all")
    system = learned({"conversations": turns, "system": "be brief"}, **both)
    assert system == learned([{"role": "system", "content": "be brief"}, *CHAT], train_on="all")
    with pytest.raises(UserError, match=r"a:1: 'bing' in \"from\" is not a ShareGPT role"):
        learned({"conversations": [{"from": "bing", "value": "x"}]}, format="sharegpt")
    with pytest.raises(UserError, match=r'must hold a list of messages .* set data.format="sharegpt"'):
        learned(turns)

    record = {"instruction": "Say yes.", "input": "now", "output": "yes"}
    chat = [{"role": "user", "content": "Say yes.\n\nnow"}, {"role": "assistant", "content": "yes"}]
    assert learned(record, format="alpaca", train_on="all") == learned(chat, train_on="all")
    config = tokenizer.directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    data = make_config(format="alpaca").data
    for given, end in ((None, "request.\n\n### Instruction:\nSay yes."), ("now", "\n\n### Input:\nnow")):
        prompt = encode_prompt(record | {"input": given}, data, load_tokenizer(tokenizer.directory), name="a:1")
        assert prompt.prompt.startswith("Below is an instruction that describes a task")
        assert prompt.prompt.endswith(end + "\n\n### Response:\n")
        assert prompt.expected == "yes"


def test_the_common_prefix_ends_at_the_first_different_character() -> None:
    texts = ["", "a", "b", "ab", "abc", "abd", "x" * 999 + "y", "x" * 1000, "x" * 999 + "yz"]
    for one, other in itertools.product(texts, texts):
        n = _common(one, other)
        assert one[:n] == other[:n]
        assert one == other or one[n : n + 1] != other[n : n + 1]


def test_what_cannot_be_learned_is_said_once_with_its_reason(learned: Callable[..., str]) -> None:
    no_end = "{% for m in messages %}{{ m.role }}:{{ '\n' + m.content + '\n' }}{% endfor %}"
    with pytest.warns(UserWarning, match="ends an answer without an end-of-turn token"):
        assert (
            learned(CHAT, no_end + "{% if add_generation_prompt %}assistant:{{ '\n' }}{% endif %}")
            == "yes no\n17 March\n"
        )
    with pytest.warns(UserWarning, match='with the roles gpt, user have no message with the role "assistant"'):
        assert learned([CHAT[0], {"role": "gpt", "content": "yes"}]) == ""
    assert learned([{"role": "gpt", "content": "no"}, CHAT[0]]) == ""  # a second warning would be an error
    changes = "{% for m in messages %}{{ messages[-1].content }}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(
        UserError, match=r"^a:1: the chat template .* lets message 4 .* change the text of earlier messages"
    ):
        learned(CHAT, changes)
