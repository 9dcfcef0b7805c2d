package uml

import (
	"fmt"
	"os/exec"
	"strings"

	"blockferry/integration/vm"
)

// card is the guest's network card.
const card = "vec0"

// cardArg joins it to the guest's tap.
func cardArg(spec *vm.Spec) string {
	return card + ":transport=tap,ifname=" + spec.Tap + ",depth=128,gro=1"
}

// Address gives the guest's card an address, as in 10.0.0.1/24. It is called
// in the guest.
func Address(address string) error {
	for _, args := range [][]string{{"address", "add", address, "dev", card}, {"link", "set", card, "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}
