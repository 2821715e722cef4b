from pyllm.cli import main

main()
