"""The whole service under random faults, and the proof afterwards that nothing was lost."""
