"""The sections of a report: each takes the material and gives a Section."""
