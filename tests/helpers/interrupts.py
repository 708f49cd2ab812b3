"""Interrupts: Ctrl-C at one chosen line, injected by a trace function."""

import sys
from pathlib import Path

import skipguide

ROOT = Path(skipguide.__file__).parent
# the interpreter looks for signals where calls begin and end and where loops go back, never at these words
_NO_PLACE = ("try:", "finally:", "else:")


class LineTrace:
    """Follows a function through some files of the library, line by line; raises at one place, or notes them all.

    Args:
        files: paths from the package, such as `gate.py`.
        place: file and line where KeyboardInterrupt is raised, the first time or the last; None raises nothing.
        visit: which visit of that line it is, from 1.
    """

    def __init__(self, files, place=None, visit=1):
        self.files = {str((ROOT / file).resolve()): file for file in files}
        self.place = place
        self.visit = visit
        self.visits = {}
        self.raised = False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc):
        sys.settrace(self.before)

    def _call(self, frame, event, arg):
        name = frame.f_code.co_filename
        caller = frame.f_back.f_code.co_name if frame.f_back else ""
        if "__del__" in (frame.f_code.co_name, caller):  # run by the garbage collector, and nobody sees what they raise
            return None
        if name not in self.files:  # the package's links lead to the same files under another name
            resolved = _RESOLVED.get(name)
            if resolved is None:  # asking the file system at each call would take most of the time
                resolved = _RESOLVED[name] = str(Path(name).resolve()) if name.endswith(".py") else name
            if resolved not in self.files:
                return None
            self.files[name] = self.files[resolved]
        return self._line

    def _line(self, frame, event, arg):
        if event != "line":
            return self._line
        place = self.files[frame.f_code.co_filename], frame.f_lineno
        self.visits[place] = self.visits.get(place, 0) + 1
        if place == self.place and self.visits[place] == self.visit and not self.raised:
            self.raised = True
            raise KeyboardInterrupt
        return self._line


_RESOLVED = {}


def places(trace):
    """Where a signal can come between two lines: place -> how often it was visited."""
    lines = {file: (ROOT / file).read_text().splitlines() for _, file in trace.files.items()}
    return {
        (file, line): visits
        for (file, line), visits in trace.visits.items()
        if lines[file][line - 1].strip() not in _NO_PLACE
    }
