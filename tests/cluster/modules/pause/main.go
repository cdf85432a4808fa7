// Pause holds a pod's namespaces open until it is told to stop. It is the sandbox image of the test cluster's node.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// Children that are reparented to process 1 need no waiting for when their signal is ignored (POSIX, _Exit).
	signal.Ignore(syscall.SIGCHLD)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	<-stop
}
