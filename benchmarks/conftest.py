def pytest_addoption(parser):
    parser.addoption("--seconds", default="4", help="how long the rounds of one case go on")
    parser.addoption("--rows", help="a file that gets each case's results as they come; cases that it has are left out")
