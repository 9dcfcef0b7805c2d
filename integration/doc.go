// Package integration drives the built blockferry binary and the packages
// below blockdev on real kernels with device-mapper.
//
// Its tests are ordinary Go tests. What a test hands to inGuest runs as root
// in a User-Mode Linux guest (see the package uml beside this one):
//
//	func TestSomething(t *testing.T) {
//		inGuest(t, guest{Disks: []disk{{Size: 256 << 20}}}, func(t *testing.T) {
//			run(t, "dmsetup", "targets") // in the guest
//		})
//	}
//
// Set BLOCKFERRY_CONSOLE=1 to see the guests' consoles as they are written.
package integration
