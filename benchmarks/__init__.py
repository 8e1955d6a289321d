"""Speed, memory and accuracy of kdfast beside the plain form, torch.compile of it, and peers. `benchmarks/README.md` says how to add a row."""
