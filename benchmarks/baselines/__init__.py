"""The plain forms that kdfast is compared with: what one writes in torch today. One file per op; `peers.py` has other libraries."""
