"""What getdata.sh needs beside the network."""
