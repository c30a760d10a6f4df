from validation.planners.compare import main

main()
