"""The Jinja of chat templates: a sandbox with what templates of Hugging Face models expect to find."""

import datetime
import functools
import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MARKS = {"generation_begins": "\ufdd0", "generation_ends": "\ufdd1"}
"""What a template writes around the model's own words when it is asked to: characters that no text may hold."""


class Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks the model's own words in templates for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags, with marks around it where the template is given them."""
        line = next(parser.stream).lineno
        marks = [nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line) for name in MARKS]
        return [marks[0], *parser.parse_statements(("name:endgeneration",), drop_needle=True), marks[1]]


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What templates of Hugging Face models expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    return environment


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template to render. Raises jinja2.TemplateSyntaxError."""
    return _environment().from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes what is special in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
