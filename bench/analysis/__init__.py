"""Many runs as tables, verdicts, charts and reports; what may be compared with what."""
