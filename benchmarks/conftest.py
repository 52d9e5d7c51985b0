def pytest_addoption(parser):
    parser.addoption("--seconds", default="4", help="how long the rounds of one case go on")
