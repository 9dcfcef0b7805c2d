// Fetches the kernel that guests under qemu run, into the module's .cache.
package main

import (
	"fmt"
	"os"

	"blockferry/integration/qemu"
)

func main() {
	if err := qemu.Prepare(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
