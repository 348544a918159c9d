"""An evaluator of the pseudo-code that AMD's instruction set manuals give for every instruction.

    run("D0.u32 = S0.u32 + S1.u32", {"S0": Cell(1), "S1": Cell(2), "D0": d0 := Cell(), "ARCH": "gfx942"})

A name stands for a leaf (a `Cell`, or what else reads and writes bits) or for a container, whose `at` gives what an
index or an attribute selects. What values are and do is in bitvectors.py.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from bitvectors import TYPE, Value, binary, builtin, convert, floating, integer, truth, whole

TOKEN = re.compile(r"""\s+|//[^\n]*|(?P<type>\d+'[UIFB](?!\w))|(?P<sized>\d+'(?:0x[0-9a-f]+|\d+(?:\.\d+)?)[UIFB]?)
    |(?P<number>0x[0-9a-f]+(?:U?LL|U)?|\d+\.\d+F?|\d+(?:ULL|LL|U|F)?)|(?P<name>[A-Za-z_]\w*)
    |(?P<sign>\*\*|<<|>>|<=|>=|==|!=|<>|&&|\|\||\+=|-=|[-+*/%&|^~!<>=?:;,.(){}[\]])""", re.X)
SIGNED_ZERO = re.compile(r"\((?:64'F\()?(S\d\.f\d\d)\)? == ([+-])0\.0\)")
SPECIAL = {"INF": math.inf, "NAN": math.nan, "PI": Fraction(math.pi)}
LEVELS = (("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!=", "<>"), ("<", "<=", ">", ">="), ("<<", ">>"),
          ("+", "-"), ("*", "/", "%"), ("**",))


class Cell:
    """Bits with a name: of any width, until something is written."""

    def __init__(self, bits: int = 0, width: int = 64, kind: str = "b"):
        self.bits, self.width, self.kind, self.written = bits, width, kind, 0

    def read(self, low: int, width: int) -> int:
        return self.bits >> low & (1 << width) - 1

    def write(self, low: int, width: int, bits: int) -> None:
        ones = (1 << width) - 1
        self.bits = self.bits & ~(ones << low) | (bits & ones) << low
        self.written = max(self.written, low + width)

    def replace(self, value: Value) -> None:
        self.bits, self.width, self.kind = value
        self.written = value.width


class Array:
    def __init__(self, cells: list):
        self.cells = cells

    def at(self, index: Any) -> Any:
        return self.cells[index]


class Attributes(Array):
    """A container whose parts have names."""

    def __init__(self, **cells: Cell):
        super().__init__(cells)


class Reference(NamedTuple):
    leaf: Any
    low: int = 0
    width: int | None = None
    kind: str = "b"
    backward: bool = False

    def load(self) -> Value:
        width = self.leaf.width if self.width is None else self.width
        bits = self.leaf.read(self.low, width)
        if self.backward:
            bits = int(f"{bits:0{width}b}"[::-1], 2)
        return Value(bits, width, self.leaf.kind if self.width is None else self.kind)

    def store(self, value: Value) -> None:
        if self.width is None:
            self.leaf.replace(value)
        else:
            self.leaf.write(self.low, self.width, convert(value, self.kind, self.width).bits)


class Returned(Exception):
    pass


class Broken(Exception):
    pass


# ---- the language

class Parser:
    """Pseudo-code to functions of a scope: statements do, expressions give a Value."""

    def __init__(self, text: str):
        self.tokens, at = [], 0
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None:
                raise NotImplementedError(f"pseudo-code: {text[at:at + 40]!r}")
            at = found.end()
            if found.lastgroup:
                self.tokens.append((found.lastgroup, found[0]))
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if expected is not None and token != expected:
            raise NotImplementedError(f"pseudo-code: expected {expected}, got {token!r}")
        self.at += 1
        return token

    def block(self, *ends: str) -> Callable:
        statements = []
        while self.peek() not in ends:
            if self.peek() == ";":
                self.take()
            else:
                statements.append(self.statement())

        def execute(scope: dict) -> None:
            for statement in statements:
                statement(scope)
        return execute

    def statement(self) -> Callable:
        word = self.peek()
        if word in ("if", "for", "declare", "break", "return"):
            self.take()
            return getattr(self, f"_{word}")()
        if self.peek(1) == "=" and self.peek(2) == "lambda":
            return self._lambda()
        targets = [self.unary()]
        operation = self.take()
        if operation not in ("=", "+=", "-="):
            raise NotImplementedError(f"pseudo-code: {operation!r} after a name")
        value = self.expression()
        while self.peek() == "=":
            self.take()
            targets.append(value)
            value = self.expression()

        def assign(scope: dict) -> None:
            got = loaded(value(scope))
            for target in targets:
                to = target(scope)
                if operation != "=":
                    got = binary(operation[0], to.load(), got)
                to.store(got)
        return assign

    def _if(self) -> Callable:
        condition = self.expression()
        self.take("then")
        arms, otherwise = [(condition, self.block("elsif", "else", "endif"))], None
        while (word := self.take()) != "endif":
            if word == "elsif":
                condition = self.expression()
                self.take("then")
                arms.append((condition, self.block("elsif", "else", "endif")))
            else:
                otherwise = self.block("endif")

        def choose(scope: dict) -> None:
            for test, body in arms:
                if loaded(test(scope)).bits:
                    return body(scope)
            return otherwise(scope) if otherwise else None
        return choose

    def _for(self) -> Callable:
        name = self.take()
        self.take("in")
        first = self.expression()
        self.take(":")
        last = self.expression()
        self.take("do")
        body = self.block("endfor")
        self.take("endfor")

        def loop(scope: dict) -> None:
            for i in range(integer(loaded(first(scope))), integer(loaded(last(scope))) + 1):
                scope[name] = Cell(i, 32, "i")
                try:
                    body(scope)
                except Broken:
                    break
        return loop

    def _declare(self) -> Callable:
        name = self.take()
        self.take(":")
        width, kind = self.take().split("'")
        count = None
        if self.peek() == "[":
            self.take()
            count = int(self.take())
            self.take("]")

        def declare(scope: dict) -> None:
            if name not in scope:
                cells = [Cell(0, int(width), kind.lower()) for _ in range(count or 1)]
                scope[name] = Array(cells) if count else cells[0]
        return declare

    def _break(self) -> Callable:
        def leave(scope: dict) -> None:
            raise Broken
        return leave

    def _return(self) -> Callable:
        value = self.expression()

        def leave(scope: dict) -> None:
            raise Returned(loaded(value(scope)))
        return leave

    def _lambda(self) -> Callable:
        name = self.take()
        self.take("=")
        self.take("lambda")
        self.take("(")
        names = [self.take()]
        while self.take() == ",":
            names.append(self.take())
        self.take("(")
        plain = self.peek() not in ("declare", "if", "for", "return")
        body = self.expression() if plain else self.block(")")
        self.take(")")

        def call(scope: dict, values: list[Value]) -> Value:
            try:
                return loaded(body(scope | {n: Cell(*value) for n, value in zip(names, values, strict=True)}))
            except Returned as got:
                return got.args[0]
        return lambda scope: scope.__setitem__(name, call)

    # ---- expressions: functions that give a Value or a Reference

    def expression(self) -> Callable:
        condition = self.level(0)
        if self.peek() != "?":
            return condition
        self.take()
        one = self.expression()
        self.take(":")
        other = self.expression()
        return lambda scope: (one if loaded(condition(scope)).bits else other)(scope)

    def level(self, depth: int) -> Callable:
        if depth == len(LEVELS):
            return self.unary()
        value = self.level(depth + 1)
        while self.peek() in LEVELS[depth]:
            value = self._binary(self.take(), value, self.level(depth + 1))
        return value

    def _binary(self, sign: str, one: Callable, other: Callable) -> Callable:
        if sign in ("&&", "||"):
            def short(scope: dict) -> Value:
                first = bool(loaded(one(scope)).bits)
                if first == (sign == "||"):
                    return truth(first)
                return truth(bool(loaded(other(scope)).bits))
            return short
        return lambda scope: binary(sign, loaded(one(scope)), loaded(other(scope)))

    def unary(self) -> Callable:
        sign = self.peek()
        if sign not in ("-", "!", "~", "+") or self.tokens[self.at][0] != "sign":
            return self.postfix()
        self.take()
        get = self.unary()
        return get if sign == "+" else lambda scope: _negated(sign, loaded(get(scope)))

    def postfix(self) -> Callable:
        get = self.primary()
        while self.peek() in (".", "["):
            get = self._attribute(get, self.take()) if self.take() == "." else self._index(get)
        return get

    def _attribute(self, get: Callable, name: str) -> Callable:
        found = TYPE.match(name)
        if not found:
            return lambda scope: _entered(get(scope).at(name))
        kind, width = found[1], int(found[2])

        def typed(scope: dict) -> Any:
            value = get(scope)
            if isinstance(value, str):
                return floating(SPECIAL[value], width) if value in SPECIAL else Value(0, width, "denormal")
            to = value if isinstance(value, Reference) else Reference(Cell(*value))
            if to.width is not None and to.width < width:
                return Value(to.load().bits, width, kind)
            return Reference(to.leaf, to.low, width, kind)
        return typed

    def _index(self, get: Callable) -> Callable:
        first = self.expression()
        last = None
        if self.peek() == ":":
            self.take()
            last = self.expression()
        self.take("]")

        def select(scope: dict) -> Any:
            of, high = get(scope), integer(loaded(first(scope)))
            if hasattr(of, "at"):
                return _entered(of.at(high))
            to = of if isinstance(of, Reference) else Reference(Cell(*of))
            low = high if last is None else integer(loaded(last(scope)))
            if low > high:
                return Reference(to.leaf, to.low + high, low - high + 1, "b", True)
            return Reference(to.leaf, to.low + low, high - low + 1, "b")
        return select

    def primary(self) -> Callable:
        group, token = self.tokens[self.at]
        self.take()
        if group == "number":
            return _constant(_literal(token))
        if group == "sized":
            width, rest = token.split("'")
            kind = rest[-1].lower() if rest[-1] in "UIFB" else "u"
            if "." in rest:
                return _constant(floating(Fraction(rest) or 0.0, int(width)))
            return _constant(whole(int(rest.rstrip("UIFB"), 0), int(width), kind))
        if group == "type":
            width, kind = token.split("'")
            self.take("(")
            value = self.expression()
            self.take(")")
            return lambda scope: convert(loaded(value(scope)), kind.lower(), int(width))
        if token == "(":
            value = self.expression()
            self.take(")")
            return value
        if token == "{":
            return self._joined()
        if group == "name" and self.peek() == "(":
            return self._call(token)
        if group == "name":
            return lambda scope: _entered(scope[token]) if token in scope else _unknown(scope, token)
        raise NotImplementedError(f"pseudo-code: {token!r}")

    def _joined(self) -> Callable:
        parts = [self.expression()]
        while self.take() == ",":
            parts.append(self.expression())
        return lambda scope: _Joined([part(scope) for part in parts])

    def _call(self, name: str) -> Callable:
        self.take("(")
        arguments = []
        while self.peek() != ")":
            arguments.append(self.expression())
            if self.peek() == ",":
                self.take()
        self.take(")")

        def call(scope: dict) -> Any:
            values = [loaded(argument(scope)) for argument in arguments]
            if name in scope:
                return scope[name](scope, values)
            return _of_instruction(name, values, scope) if name in published() else builtin(name, values, scope["ARCH"])
        return call


def _of_instruction(name: str, values: list[Value], scope: dict) -> Value:
    """Pseudo-code calls other instructions by their names, which end in the result's type."""
    inner = {f"S{i}": Cell(*value) for i, value in enumerate(values)} | {"D0": Cell(), "ARCH": scope["ARCH"]}
    run(published()[name], inner | {"WAVE_MODE": scope.get("WAVE_MODE")})
    kind, width = TYPE.match(name.rsplit("_", 1)[1] if name[0] == "v" else "i32").groups()
    return Value(inner["D0"].read(0, int(width)), int(width), kind)


class _Joined(list):
    """{ high, ..., low }: a value, or where one goes."""

    def load(self) -> Value:
        bits, width = 0, 0
        for part in self:
            value = loaded(part)
            bits, width = bits << value.width | value.bits, width + value.width
        return Value(bits, width, "u")

    def store(self, value: Value) -> None:
        low = 0
        for part in reversed(self):
            part.store(Value(value.bits >> low & (1 << part.width) - 1, part.width, "b"))
            low += part.width


def loaded(value: Any) -> Value:
    if isinstance(value, Value):
        return value
    return floating(SPECIAL[value], 64) if isinstance(value, str) else value.load()


def _entered(found: Any) -> Any:
    return found if hasattr(found, "at") else Reference(found)


def _unknown(scope: dict, name: str) -> Any:
    """A constant, or a name that is about to be written."""
    if name in SPECIAL or name == "DENORM":
        return name
    if name == "UNDERFLOW_F32":
        return Value(0, 32, "f")
    scope[name] = Cell()
    return Reference(scope[name])


def _negated(sign: str, value: Value) -> Value:
    if sign == "!":
        return truth(not value.bits)
    if value.kind in ("f", "bf"):
        return value._replace(bits=value.bits ^ 1 << value.width - 1)
    return whole(~integer(value) if sign == "~" else -integer(value), value.width, value.kind)


def _constant(value: Value) -> Callable:
    return lambda scope: value


def _literal(token: str) -> Value:
    if "x" not in token and ("." in token or token.endswith("F")):
        return floating(Fraction(token.rstrip("F")) or 0.0, 32 if token.endswith("F") else 64)
    number = int(token.rstrip("UL"), 0)
    kind = "b" if "x" in token and "U" not in token else "u" if "U" in token else "i"
    return whole(number, 64 if "LL" in token or number >= 2**32 else 32, kind)


@cache
def compiled(text: str) -> Callable[[dict], None]:
    return Parser(text).block("")


@cache
def published() -> dict[str, str]:
    """Mnemonic -> pseudo-code, of the CDNA manuals as the package tinygrad has them."""
    from tinygrad.runtime.autogen.amd.cdna.str_pcode import PCODE
    return {op.name.lower().removesuffix("_e32").removesuffix("_e64"): SIGNED_ZERO.sub(_with_sign, text)
            for op, text in PCODE.items()}


def _with_sign(found: re.Match) -> str:
    """"x == -0.0" asks for the sign, too, where maximum and minimum tell zeros apart."""
    return f"(({found[1]} == 0.0) && (sign({found[1]}) == 1'{int(found[2] == '-')}U))"


def run(text: str, scope: dict[str, Any]) -> None:
    """Raises NotImplementedError where the text has what this evaluator does not know."""
    compiled(text)(scope)
