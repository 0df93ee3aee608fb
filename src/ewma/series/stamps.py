"""Time stamps: what elapsed between the values of a series, from numbers, datetimes or timedeltas."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

import numpy

from ewma.arrays import is_tensor
from ewma.columns import Vector

SECOND = numpy.timedelta64(1, "s")


class Stamps(NamedTuple):
    """`elapsed[t]` is what passed before value t, in units or seconds; `last` the newest stamp, from which to go on."""

    elapsed: Vector
    last: Any
    in_seconds: bool = True


def stamps(times: Any, n: int, last: Any = None) -> Stamps:
    """What elapsed before each of n values.

    Args:
        times: one for each value, never decreasing; datetimes and timedeltas are taken in seconds.
        last: the stamp before the first; without it, one unit elapses before the first.

    Equal stamps elapse nothing: such values weigh alike.
    """
    array = _as_array(times)
    if array.shape != (n,):
        raise ValueError(
            f"expected times of length {n}, one for each value along the axis; got shape {list(array.shape)}"
        )
    if not n:
        return Stamps(numpy.empty(0), last)
    if last is not None:
        _check_kind(last, array[0])
    missing = numpy.isnat(array) if array.dtype.kind in "Mm" else ~numpy.isfinite(array)
    if missing.any():
        place = int(missing.argmax())
        raise ValueError(f"expected a time for every value; times[{place}] is {array[place]}")
    begin = array[:1] if last is None else numpy.asarray([last])
    whole = numpy.concatenate((begin, array))
    back = whole[1:] < whole[:-1]
    if back.any():
        place = int(back.argmax())
        before = begin[0] if place == 0 else array[place - 1]
        raise ValueError(
            f"expected times that never decrease; times[{place}] = {array[place]} comes after {before}. Sort "
            f"by time first: order = numpy.argsort(times), then x[order] and times[order]."
        )
    if array.dtype.kind == "i":  # two of them may lie further apart than their dtype goes: modulo 2 ** 64 they do not
        elapsed = numpy.diff(whole.astype("int64").view("uint64")).astype(float)
    else:
        differences = numpy.diff(whole)
        elapsed = differences / SECOND if differences.dtype.kind == "m" else differences
    if last is None:
        elapsed[0] = 1.0
    return Stamps(elapsed, array[-1] if dated(array) else array[-1].item(), dated(array))


def _check_kind(last: Any, stamp: Any) -> None:
    if _kind(last) != _kind(stamp):
        raise TypeError(f"expected times as before, such as {last!r}; got {stamp!r}")


def check_order(last: Any, stamp: Any) -> None:
    """Refuse a last stamp of values that should come after others, where it comes before that of these."""
    _check_kind(last, stamp)
    if stamp < last:
        raise ValueError(f"expected values that came later; the last of them is of {stamp}, before {last}")


def _as_array(times: Any) -> Any:
    if is_tensor(times):
        times = times.detach().cpu()
        times = (times.double() if times.is_floating_point() else times).numpy()
    if getattr(getattr(times, "dtype", None), "tz", None) is not None:  # pandas, with a time zone
        times = (times.dt if hasattr(times, "dt") else times).tz_convert(None)
    if hasattr(times, "to_numpy"):
        times = times.to_numpy()
    if isinstance(times, str) or not hasattr(times, "__len__"):
        raise TypeError(f"expected times as a list or an array; got {times!r}")
    array = numpy.asarray(times) if hasattr(times, "dtype") else numpy.asarray(times, dtype=_object_if_dated(times))
    if not array.size:
        return array.astype(float)
    if array.dtype.kind == "O" and isinstance(array.flat[0], datetime.date | datetime.timedelta):
        array = numpy.array([_exact(time, array.flat[0]) for time in array.flat]).reshape(array.shape)
    if array.dtype.kind == "f":
        return array.astype(float)
    if array.dtype.kind == "u":
        return array.astype("int64" if array.max() < 2**63 else float)
    if array.dtype.kind in "Mm" and numpy.datetime_data(array.dtype)[0] in "YM":  # of no one length
        return array.astype(f"{array.dtype.kind}8[s]")
    if array.dtype.kind in "iMm":
        return array
    raise TypeError(f"expected times as numbers, datetimes or timedeltas; got {_came(array)}")


def _came(array: Any) -> str:
    """What came in place of times, and what may help."""
    if array.dtype.kind == "O":
        place, first = next(
            ((place, time) for place, time in enumerate(array.flat) if not isinstance(time, int | float)),
            (0, array.flat[0]),
        )
        came, text = f"times[{place}] = {first!r}", isinstance(first, str)
        if isinstance(first, int):
            return f"{came}, which is too large. Count from the first: [time - times[0] for time in times]."
        if hasattr(first, "to_timestamp"):
            return f"{came}. A period becomes its begin with times.to_timestamp()."
    else:
        came, text = f"{array.dtype}", array.dtype.kind in "US"
    parsed = "numpy.asarray(times, dtype='datetime64[s]') or pandas.to_datetime(times)"
    return f"{came}{f'. Text is parsed by {parsed}.' if text else ''}"


def _object_if_dated(times: Any) -> Any:
    """NumPy would drop the time zone of a datetime: those are converted one by one."""
    return object if len(times) and isinstance(times[0], datetime.date | datetime.timedelta) else None


def _exact(time: Any, first: Any) -> Any:
    """A datetime in UTC, or a timedelta, as NumPy's."""
    kind = datetime.timedelta if isinstance(first, datetime.timedelta) else datetime.date
    if not isinstance(time, kind):
        name = "timedelta" if kind is datetime.timedelta else "datetime"
        raise TypeError(f"expected every time to be a {name}, as the first is; got {time!r}")
    if (getattr(time, "tzinfo", None) is None) != (getattr(first, "tzinfo", None) is None):
        raise TypeError(f"expected all times with a time zone or none; got {first!r} and {time!r}")
    if isinstance(time, datetime.datetime) and time.tzinfo is not None:
        time = time.astimezone(datetime.UTC).replace(tzinfo=None)
    if hasattr(time, "asm8"):  # pandas', with nanoseconds
        return time.asm8
    return numpy.timedelta64(time) if kind is datetime.timedelta else numpy.datetime64(time)


def _kind(stamp: Any) -> str:
    """ "M" for datetimes, "m" for timedeltas, "" for numbers."""
    kind: str = numpy.asarray(stamp).dtype.kind
    return kind if kind in "Mm" else ""


def dated(stamp: Any) -> bool:
    """Whether a stamp is a datetime or timedelta, so that elapsed is in seconds."""
    return bool(_kind(stamp))


def in_seconds(name: str, duration: Any, dated: bool) -> Any:
    """A timedelta, or an array of them, as seconds; anything else as it is."""
    seconds: Any
    if isinstance(duration, datetime.timedelta):
        seconds = duration.total_seconds()
    elif getattr(getattr(duration, "dtype", None), "kind", "") == "m":
        seconds = duration / SECOND
        seconds = seconds if seconds.ndim else float(seconds)
    else:
        return duration
    if not dated:
        raise TypeError(f"{name}={duration!r} is a duration, which needs times= of datetimes or timedeltas")
    return seconds


def later(stamp: Any, elapsed: float) -> Any:
    """The stamp after so many units, or seconds."""
    if dated(stamp):
        return stamp + numpy.timedelta64(round(elapsed * 1e9), "ns")
    # Nanoseconds since 1970 are too many for a float.
    return stamp + int(elapsed) if isinstance(stamp, int) and float(elapsed).is_integer() else stamp + elapsed


def to_json(stamp: Any) -> Any:
    """A stamp as a number, or as [kind, unit, number]."""
    if not dated(stamp):
        return stamp if isinstance(stamp, int) else float(stamp)
    return [stamp.dtype.str, int(stamp.astype("int64"))]


def from_json(saved: Any) -> Any:
    """The stamp of which `to_json` made this."""
    return numpy.array(saved[1]).astype(saved[0])[()] if isinstance(saved, list) else saved
