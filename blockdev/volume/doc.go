// Package volume puts a replicated volume on a disk and takes cuts of it.
//
// A volume is a stack of device-mapper devices, from the outside in:
//
//	<name>         linear: what applications open; suspended for a cut
//	<name>-era     era: marks what is written, before it is written
//	<name>-base    linear; snapshot-origin while a cut has a frozen view
//	<name>-data    linear: the disk's data area
//	<name>-meta    linear: the era metadata, beside it
//	<name>-cow     linear: where a snapshot keeps what is overwritten
//	<name>-snap    snapshot: a cut's frozen view, while there is one
//
// Up builds it or adopts what an earlier process left, Down takes it away.
// All device-mapper calls for a volume come from the one Volume that holds
// the disk's lock, and from its dead-man.
package volume
