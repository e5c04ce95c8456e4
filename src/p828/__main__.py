from p828.cli.main import main

main()
