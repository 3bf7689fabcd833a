"""python -m kit.filter"""

from eval import filter_main

if __name__ == "__main__":
    filter_main()
