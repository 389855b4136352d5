"""The report: tables and figures from stored results, in six forms, and comparisons of runs."""
