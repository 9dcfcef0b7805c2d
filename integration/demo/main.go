// Command demo shows what blockferry is for: a
// file system on a replicated volume is written to by several writers, the
// SSD below is wiped in mid-load, the volume is restored from its replica, and
// every block is held against what the writers knew to be durable.
//
// It ends in one line that begins with 'demo: OK' or 'demo: FAILED', and exits
// with 0 only if nothing differs.
package main

import (
	"flag"
	"fmt"
	"os"

	"blockferry/integration/uml"
)

// diskBytes is the size of either disk.
const diskBytes = 1280 << 20

func main() {
	uml.Init()
	seconds := flag.Int("seconds", 20, "how long to write, at least, before the SSD is wiped")
	guestOnly := flag.Bool("guest", false, "on a mapper of its own, in a guest, even where this machine could show it")
	flag.Parse()
	var err error
	switch why := whyNotNative(); {
	case uml.Inside():
		err = inGuest()
	case os.Getenv(nativeVar) != "":
		err = withOwnMounts(*seconds)
	case *guestOnly:
		err = boot(*seconds)
	case why != "":
		fmt.Println("Not on this machine's own kernel:", why)
		err = boot(*seconds)
	default:
		err = onThisMachine()
	}
	if err != nil {
		fmt.Println("demo: FAILED:", err)
		os.Exit(1)
	}
}
