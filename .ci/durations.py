"""Sums up what the tests of each file took: durations.py REPORT.xml FILE.json.

The report is the one of pytest's --junitxml. The file has whole seconds by
file, the longest first. It is committed, so that growth is seen; and it tells
the root conftest.py in which order several processes do best.
"""

import collections
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def main() -> None:
  """Reads the report and writes the file."""
  report, file = map(pathlib.Path, sys.argv[1:])
  seconds: dict[str, float] = collections.defaultdict(float)
  for case in ElementTree.parse(report).iter('testcase'):
    path = case.get('classname', '').replace('.', '/') + '.py'
    seconds[path] += float(case.get('time', 0))
  longest_first = sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
  rounded = {path: round(value) for path, value in longest_first}
  file.write_text(json.dumps(rounded, indent=1) + '\n')


if __name__ == '__main__':
  main()
