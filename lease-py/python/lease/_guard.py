"""The decorator ``guard``."""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable
from typing import Any

from lease._errors import AcquireTimeout, InvalidArgument, WrongType

_OPTIONS = frozenset({"ttl", "timeout", "owner"})


def _called(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


class _Names:
    """The name of each call: a template with the arguments filled in."""

    def __init__(self, template: str, function: Callable[..., Any], pass_as: str | None) -> None:
        self.called = _called(function)
        try:
            signature = inspect.signature(function)
        except ValueError:
            raise InvalidArgument(f"{self.called} does not tell its parameters: wrap it in a function") from None
        parameters = dict(signature.parameters)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if pass_as is not None and parameters.pop(pass_as, None) is None and not takes_any:
            raise InvalidArgument(f"pass_as={pass_as!r}: {self.called} has no such parameter")
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise InvalidArgument(f"name {template!r} is no template: {error}; for a brace write it twice") from None
        for field in fields:
            first = field.split(".")[0].split("[")[0]
            if not first.isidentifier() or not (first in parameters or takes_any):
                raise InvalidArgument(f"name {template!r}: {self.called} has no parameter {first!r} to fill in")
        self.template = template
        self.pass_as = pass_as
        self.full = signature
        self.signature = signature.replace(parameters=list(parameters.values()))
        self.fields = fields

    def with_lease(self, args: tuple[Any, ...], kwargs: dict[str, Any], held: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with the lease where it belongs among them."""
        if self.pass_as is None:
            return args, kwargs
        given = {**self.signature.bind(*args, **kwargs).arguments, self.pass_as: held}
        bound = inspect.BoundArguments(self.full, {name: given[name] for name in self.full.parameters if name in given})
        if self.pass_as not in self.full.parameters:
            return bound.args, {**bound.kwargs, self.pass_as: held}
        return bound.args, bound.kwargs

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if not self.fields:
            return self.template.format()
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[str, Any] = {}
        for parameter in self.signature.parameters.values():
            value = bound.arguments[parameter.name]
            values[parameter.name] = value
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update(value)
        try:
            return self.template.format_map(values)
        except KeyError as error:
            raise InvalidArgument(f"name {self.template!r}: this call of {self.called} gives no {error}") from None


def guard(
    manager: Any,
    is_async: bool,
    name: str,
    /,
    *,
    if_busy: str = "raise",
    pass_as: str | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if not isinstance(name, str):
        raise WrongType(f"name must be a str, not {type(name).__name__}: write @manager.guard(name)")
    for word in options:
        if word not in _OPTIONS:
            raise WrongType(f"guard: unknown keyword {word!r}. Known: ttl, timeout, owner, if_busy, pass_as")
    if if_busy not in ("raise", "skip"):
        raise InvalidArgument(f"if_busy={if_busy!r}: give 'raise', or 'skip' to return None when somebody else holds the name")

    if if_busy == "skip" and options.setdefault("timeout", 0) is None:
        raise InvalidArgument("if_busy='skip' with timeout=None would wait for ever: give timeout=0 for one attempt")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(function):
            raise WrongType(f"guard decorates a function, not {type(function).__name__}: write @manager.guard(name)")
        called = _called(function)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise WrongType(f"{called} is a generator, whose body runs after the call: acquire the lease in its body")
        if inspect.iscoroutinefunction(function) != is_async:
            if is_async:
                raise WrongType(f"{called} is no coroutine function: give one, or guard a plain function with lease.Manager")
            raise WrongType(f"{called} is a coroutine function: guard it with lease.AsyncManager")
        names = _Names(name, function, pass_as)

        if is_async:

            @functools.wraps(function)
            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                try:
                    held = await manager.acquire(names.of(args, kwargs), **options)
                except AcquireTimeout:
                    if if_busy == "skip":
                        return None
                    raise
                async with held:
                    args, kwargs = names.with_lease(args, kwargs, held)
                    return await function(*args, **kwargs)

            guarded = guarded_async
        else:

            @functools.wraps(function)
            def guarded_sync(*args: Any, **kwargs: Any) -> Any:
                try:
                    held = manager.acquire(names.of(args, kwargs), **options)
                except AcquireTimeout:
                    if if_busy == "skip":
                        return None
                    raise
                with held:
                    args, kwargs = names.with_lease(args, kwargs, held)
                    result = function(*args, **kwargs)
                    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
                        # Its body runs when the lease is released.
                        if inspect.iscoroutine(result):
                            result.close()
                        raise WrongType(
                            f"{names.called} gives what runs after the call: guard it with lease.AsyncManager,"
                            " or acquire the lease in its body"
                        )
                    return result

            guarded = guarded_sync
        guarded.__signature__ = names.signature  # type: ignore[attr-defined]
        return guarded

    return decorate
