"""Chat templates, in the style of real ones, against what transformers renders of them."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from lmx.data.chat import ChatTemplate, check_messages, find_template
from lmx.errors import UserError

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday: " + (date if date is defined else strftime_now("%Y")) + "\\n" }}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- set ns = namespace(last=0, many=false) %}
{%- for tool in tools or [] %}
    {{- tool | tojson }}
{%- endfor %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.many %}
        {%- set ns.many = true %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- generation %}
    {{- '<|im_start|>' + message.role + ('\\n<think>\\n' if loop.index0 > ns.last else '\\n') }}
    {{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start>' + role + '\\n' + message['content'] | trim + '<end>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start>model\\n'}}{% endif %}
"""
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "gemma": GEMMA}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": ' Hi <b>you</b> & "é" '}
ANSWER, SYSTEM = {"role": "assistant", "content": "Yes?"}, {"role": "system", "content": "Be brief."}
TOOL = {"name": "add", "parameters": {"a": {"description": "é <x>"}}}
CASES: list[tuple[str, list[dict[str, str]], dict[str, Any], str]] = [
    (
        "llama",
        [SYSTEM, USER, ANSWER],
        {"date": "1 May"},
        "<s><|head|>system<|/head|>\n\nToday: 1 May\nBe brief.<|eot|>"
        '<|head|>user<|/head|>\n\nHi <b>you</b> & "é"<|eot|>'
        "<|head|>assistant<|/head|>\n\nYes?<|eot|><|head|>assistant<|/head|>\n\n",
    ),
    (
        "qwen",
        [USER, ANSWER, USER, ANSWER],
        {"tools": [TOOL], "enable_thinking": False},
        '{"name": "add", "parameters": {"a": {"description": "é <x>"}}}'
        '<|im_start|>user\n Hi <b>you</b> & "é" <|im_end|>\n'
        '<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n Hi <b>you</b> & "é" <|im_end|>\n'
        "<|im_start|>assistant\n<think>\nYes?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    (
        "gemma",
        [USER, ANSWER, USER],
        {},
        '<s><start>user\nHi <b>you</b> & "é"<end>\n\n<start>model\nYes?<end>\n\n'
        '<start>user\nHi <b>you</b> & "é"<end>\n\n<start>model\n',
    ),
    ("gemma", [USER], {"add_generation_prompt": False}, '<s><start>user\nHi <b>you</b> & "é"<end>\n\n'),
]
"""The texts are transformers' own (5.23)."""


@pytest.mark.parametrize(("name", "messages", "options", "text"), CASES)
def test_templates_render_as_in_transformers(
    name: str, messages: list[dict[str, str]], options: dict[str, Any], text: str
) -> None:
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, **options) == text


def test_templates_know_the_date() -> None:
    year = str(datetime.date.today().year)
    assert f"Today: {year}" in ChatTemplate(LLAMA, SPECIAL).render([USER])


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (GEMMA, [SYSTEM, USER], "no system role"),
        (GEMMA, [USER, USER], "Roles must alternate"),
        ("{% for %}", [USER], "does not take these messages"),
        ("{{ messages[0].content.__class__.__mro__ }}", [USER], "unsafe"),
        ("{{ messages.append(1) }}", [USER], "unsafe"),
        ("{{ 1 }}", [{"role": "user", "content": object()}], "expected text, numbers"),
        ("{{ 1 // 0 }}", [USER], "does not take these messages: .*zero"),
        ("{{ messages[0].content.index('?') }}", [USER], "does not take these messages: substring not found"),
        ("{{ '%(a)s' % messages[0] }}", [USER], "does not take these messages: 'a'"),
        ("{{ 2.0 ** 5000 }}", [USER], "does not take these messages"),
    ],
)
def test_what_a_template_refuses_or_may_not_do(template: str, messages: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ChatTemplate(template).render(messages)


def test_templates_are_found(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    assert find_template(tmp_path, {}) is None
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert find_template(tmp_path, SPECIAL) == ChatTemplate("one", SPECIAL)
    several = [{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]
    settings.write_text(json.dumps({"chat_template": several}))
    assert find_template(tmp_path, {}) == ChatTemplate("three")
    (tmp_path / "chat_template.jinja").write_text("four")
    assert find_template(tmp_path, {}) == ChatTemplate("four")


@pytest.mark.parametrize("messages", ["hello", [], ["hello"], [{"content": "x"}], {"role": "user"}])
def test_messages_have_a_form(messages: Any) -> None:
    with pytest.raises(UserError, match="messages must be a list"):
        check_messages(messages)
