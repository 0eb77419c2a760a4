"""The report of a run: report.html, one self-contained page made from what the workdir holds.

What belongs here: the data that a run records for its report (report.json), the headline numbers, the charts, and the
page's template. Nothing here trains or evaluates.
"""
